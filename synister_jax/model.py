# SPDX-License-Identifier: Apache-2.0
"""VGG3D as published (funlib.learn.torch Vgg3D), in Flax Linen."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.nn import initializers

from synister_jax import convolution
from synister_jax.command import UserError

# PyTorch's default for convolutions and dense layers: U(±1/√fan_in), bias included.
_KERNEL_INIT = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_init(fan_in: int) -> initializers.Initializer:
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv3D(nn.Module):
    """3×3×3 convolution with bias, stride 1, zero padding 1."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        shape = (3, 3, 3, channels, self.features)
        kernel = self.param("kernel", _KERNEL_INIT, shape, jnp.float32)
        bias = self.param(
            "bias", _bias_init(27 * channels), (self.features,), jnp.float32
        )
        return convolution.conv3d(x, kernel) + bias


def _max_pool(x: jax.Array, factors: Sequence[int]) -> jax.Array:
    """Maximum over blocks of `factors` (z, y, x), which divide the sizes of x.

    As a reduction over split axes: XLA's windowed maximum has a gradient that takes
    six times longer on a CPU.
    """
    batch, *sizes, features = x.shape
    split = [
        n
        for pair in zip(sizes, factors, strict=True)
        for n in (pair[0] // pair[1], pair[1])
    ]
    return x.reshape(batch, *split, features).max(axis=(2, 4, 6))


class VGG3D(nn.Module):
    """[batch, z, y, x] in [-1, 1] → logits [batch, classes].

    Each level: (convolution, batch norm, ReLU) × n, then max-pool; the head: flatten,
    two hidden dense layers with ReLU and dropout, logits.
    """

    classes: int
    features: int
    feature_multipliers: Sequence[int]
    downsample_factors: Sequence[Sequence[int]]
    convolutions: Sequence[int]
    dense_features: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x[..., None]
        features = self.features
        for level, factors in enumerate(self.downsample_factors):
            for i in range(self.convolutions[level]):
                x = Conv3D(features, name=f"level{level}_conv{i}")(x)
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=0.9,
                    epsilon=1e-5,
                    name=f"level{level}_norm{i}",
                )(x)
                x = nn.relu(x)
            x = _max_pool(x, factors)
            features *= self.feature_multipliers[level]
        # Channels first, so that the original's dense weights fit as they are.
        x = x.transpose(0, 4, 1, 2, 3).reshape(len(x), -1)
        for i in range(2):
            x = nn.relu(self._dense(x, self.dense_features, f"dense{i}"))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return self._dense(x, self.classes, "logits")

    def _dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
        return nn.Dense(
            features,
            kernel_init=_KERNEL_INIT,
            bias_init=_bias_init(x.shape[-1]),
            name=name,
        )(x)


def from_config(config: ml_collections.ConfigDict) -> VGG3D:
    """The network of a config; `UserError` when its crop does not fit its levels."""
    settings = config.model
    levels = len(settings.downsample_factors)
    for name in ("feature_multipliers", "convolutions"):
        if len(settings[name]) != levels:
            raise UserError(
                f"config.model.{name} has {len(settings[name])} entries for "
                f"{levels} levels (config.model.downsample_factors)"
            )
    for axis, size in enumerate(config.crop_shape_zyx):
        factor = math.prod(factors[axis] for factors in settings.downsample_factors)
        if size % factor:
            raise UserError(
                f"config.crop_shape_zyx[{axis}] = {size} is not divisible by the "
                f"product {factor} of its downsample_factors"
            )
    return VGG3D(
        classes=len(config.classes),
        features=settings.features,
        feature_multipliers=tuple(settings.feature_multipliers),
        downsample_factors=tuple(map(tuple, settings.downsample_factors)),
        convolutions=tuple(settings.convolutions),
        dense_features=settings.dense_features,
        dropout=settings.dropout,
    )
