# SPDX-License-Identifier: Apache-2.0
"""Batch norm and the maximum over blocks, with gradients written by hand.

On a CPU the gradients that XLA derives read the activations many times; docs/speed.md
has the measurements.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

_EPSILON = 1e-5  # PyTorch's default for batch norm


@jax.custom_vjp
def _normalised_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (batch norm of x, mean and variance of the batch).

    All axes but the last are averaged over. Only the first result has a gradient. It is
    written by hand with two passes over the activations. The gradient that XLA derives
    takes twice as long on a CPU.
    """
    return _normalised_forward(x, scale, bias)[0]


def _normalised_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple]:
    axes = tuple(range(x.ndim - 1))
    full = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = full.mean(axis=axes)
    var = jnp.maximum(0, jnp.square(full).mean(axis=axes) - jnp.square(mean))
    factor = scale * jax.lax.rsqrt(var + _EPSILON)
    y = ((full - mean) * factor + bias).astype(x.dtype)
    return (y, mean, var), (x, scale, mean, var)


def _normalised_backward(saved: tuple, cotangents: tuple) -> tuple:
    """Computes the gradient as in Ioffe and Szegedy 2015, section 3."""
    x, scale, mean, var = saved
    # The barrier stops XLA from computing the cotangent again for each of its uses.
    cotangent = jax.lax.optimization_barrier(cotangents[0])
    axes = tuple(range(x.ndim - 1))
    full = cotangent.astype(mean.dtype)
    centred = x.astype(mean.dtype) - mean
    count = math.prod(x.shape[:-1])
    by_bias = full.sum(axis=axes)
    by_factor = (full * centred).sum(axis=axes)
    inverse = jax.lax.rsqrt(var + _EPSILON)
    slope = by_factor * jnp.square(inverse) / count
    by_x = (full - by_bias / count - centred * slope) * (scale * inverse)
    return by_x.astype(x.dtype), by_factor * inverse, by_bias


_normalised_by_batch.defvjp(_normalised_forward, _normalised_backward)


class BatchNorm(nn.Module):
    """PyTorch's batch norm over all axes but the last.

    PyTorch's momentum of 0.1 means that an average keeps 0.9 of its old value.
    """

    features: int

    def setup(self) -> None:
        shape = (self.features,)
        self.scale = self.param("scale", initializers.ones, shape, jnp.float32)
        self.bias = self.param("bias", initializers.zeros, shape, jnp.float32)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def of_batch(self, x: jax.Array, added: jax.Array | float = 0.0) -> jax.Array:
        """Normalises x by the batch's mean and variance, and updates the averages.

        Args:
          x: [batch, …, features].
          added: a constant per feature that belongs to x, for example the bias of a
            convolution. Subtracting the batch's mean removes this constant, so it only
            enters the average of the mean, and its gradient is 0.
        """
        y, mean, var = _normalised_by_batch(x, self.scale, self.bias)
        if not self.is_initializing():
            for average, value in ((self.mean, mean + added), (self.var, var)):
                average.value = 0.9 * average.value + 0.1 * value
        return y

    def of_average(self) -> tuple[jax.Array, jax.Array]:
        """Returns factor and shift: with the averages, the layer is x · factor + shift.

        Both are float32 [features].
        """
        factor = self.scale * jax.lax.rsqrt(self.var.value + _EPSILON)
        return factor, self.bias - self.mean.value * factor


def _blocks(x: jax.Array, factors: Sequence[int]) -> jax.Array:
    """Splits the axes z, y and x into blocks of `factors` (fz, fy, fx).

    The shape [b, z, y, x, f] becomes [b, z/fz, fz, y/fy, fy, x/fx, fx, f].
    """
    batch, *sizes, features = x.shape
    split = [
        n
        for size, factor in zip(sizes, factors, strict=True)
        for n in (size // factor, factor)
    ]
    return x.reshape(batch, *split, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, factors: tuple[int, int, int]) -> jax.Array:
    """Returns the maximum over blocks of x, [batch, z, y, x, features].

    The maximum is a reduction over split axes, because the gradient of XLA's windowed
    maximum takes six times longer on a CPU. If several voxels of a block have the
    maximum, they share the gradient equally.

    Args:
      factors: size of a block (z, y, x); it must divide the shape of x.
    """
    return _blocks(x, factors).max(axis=(2, 4, 6))


def _max_pool_forward(
    x: jax.Array, factors: tuple[int, int, int]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Without the barrier, XLA would compute the batch norm again for each voxel of a
    # block.
    x = jax.lax.optimization_barrier(x)
    pooled = max_pool(x, factors)
    return pooled, (x, pooled)


def _max_pool_backward(
    factors: tuple[int, int, int],
    saved: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array]:
    x, pooled = saved
    blocks = _blocks(x, factors)
    corners = itertools.product(*map(range, factors))
    equal = sum(
        (blocks[:, :, i, :, j, :, k] == pooled).astype(cotangent.dtype)
        for i, j, k in corners
    )
    share = jax.lax.optimization_barrier(cotangent / equal)

    def spread(values: jax.Array) -> jax.Array:
        return jnp.expand_dims(values, (2, 4, 6))

    by_x = jnp.where(blocks == spread(pooled), spread(share), 0)
    return (by_x.reshape(x.shape),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
