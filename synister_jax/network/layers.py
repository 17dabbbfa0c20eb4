# SPDX-License-Identifier: Apache-2.0
"""Batch norm, and the maximum over blocks, with gradients written out.

What XLA derives reads the activations many times over on a CPU: docs/speed.md.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

_EPSILON = 1e-5  # of batch norm, PyTorch's default


@jax.custom_vjp
def _normalised_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(batch norm of x over all axes but the last, mean and variance of the batch).

    The gradient is of the first alone. It is written out, in two passes over the
    activations: what XLA derives takes twice as long on a CPU.
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
    """Ioffe and Szegedy 2015, section 3."""
    x, scale, mean, var = saved
    # Computed once, not again for each of its uses.
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
    """PyTorch's, over all axes but the last: its momentum 0.1 is 0.9 here."""

    features: int

    def setup(self) -> None:
        shape = (self.features,)
        self.scale = self.param("scale", initializers.ones, shape, jnp.float32)
        self.bias = self.param("bias", initializers.zeros, shape, jnp.float32)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def of_batch(self, x: jax.Array, added: jax.Array | float = 0.0) -> jax.Array:
        """x with the batch's own mean and variance; moves the averages towards them.

        Args:
          added: a constant of each feature that belongs to x, as a convolution's bias
            does. The batch's mean takes it away again, so only the average has it, and
            its gradient is 0.
        """
        y, mean, var = _normalised_by_batch(x, self.scale, self.bias)
        if not self.is_initializing():
            for average, value in ((self.mean, mean + added), (self.var, var)):
                average.value = 0.9 * average.value + 0.1 * value
        return y

    def of_average(self) -> tuple[jax.Array, jax.Array]:
        """(factor, shift): with the averages the layer is x · factor + shift."""
        factor = self.scale * jax.lax.rsqrt(self.var.value + _EPSILON)
        return factor, self.bias - self.mean.value * factor


def _blocks(x: jax.Array, factors: Sequence[int]) -> jax.Array:
    """[b, z, y, x, f] → [b, z', fz, y', fy, x', fx, f] for `factors` (fz, fy, fx)."""
    batch, *sizes, features = x.shape
    split = [
        n
        for size, factor in zip(sizes, factors, strict=True)
        for n in (size // factor, factor)
    ]
    return x.reshape(batch, *split, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, factors: tuple[int, int, int]) -> jax.Array:
    """Maximum over blocks of `factors` (z, y, x), which divide the sizes of x.

    As a reduction over split axes: XLA's windowed maximum has a gradient that takes
    six times longer on a CPU. Equal maxima share the gradient.
    """
    return _blocks(x, factors).max(axis=(2, 4, 6))


def _max_pool_forward(
    x: jax.Array, factors: tuple[int, int, int]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Without it XLA would compute batch norm anew for each voxel of a block.
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
