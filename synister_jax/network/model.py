# SPDX-License-Identifier: Apache-2.0
"""The published networks in Flax Linen: VGG3D, and the ResNet-18 of BANC.

Both networks compute in `dtype`. The parameters, the batch statistics, the sums from
which the statistics are computed, and the logits are always float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.nn import initializers

from synister_jax.base.errors import UserError
from synister_jax.network import convolution
from synister_jax.network.layers import BatchNorm, max_pool

# PyTorch initialises the kernels and biases of convolutions and dense layers like this
# by default: uniform between ±1/√fan_in.
_KERNEL_INIT = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# torchvision initialises its video ResNets like this: the kernels as in He et al. 2015,
# the weights of the logits from a normal distribution of standard deviation 0.01.
_RESNET_KERNEL_INIT = initializers.variance_scaling(2, "fan_out", "normal")
_RESNET_DENSE_INIT = initializers.normal(0.01)

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _bias_init(fan_in: int) -> Callable[..., jax.Array]:
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv3D(nn.Module):
    """The parameters of a 3×3×3 convolution with bias, stride 1 and zero padding 1.

    A call with the number of input channels returns the kernel
    [3, 3, 3, channels, features] and the bias [features], both float32.
    """

    features: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        shape = (3, 3, 3, channels, self.features)
        kernel = self.param("kernel", _KERNEL_INIT, shape, jnp.float32)
        bias = self.param(
            "bias", _bias_init(27 * channels), (self.features,), jnp.float32
        )
        return kernel, bias


# For each level, a list with the kernel, bias and batch norm of each convolution.
_Levels = list[list[tuple[jax.Array, jax.Array, BatchNorm]]]


def _folded(
    kernel: jax.Array, bias: jax.Array | float, norm: BatchNorm, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns kernel and bias of a convolution that includes its batch norm."""
    factor, shift = norm.of_average()
    return (kernel * factor).astype(dtype), (bias * factor + shift).astype(dtype)


class VGG3D(nn.Module):
    """The VGG network of the original: crops in, logits out.

    The input is [batch, z, y, x] with values in [-1, 1]. The output is float32
    [batch, classes]. Each level repeats (convolution, batch norm, ReLU) and ends with a
    max-pool. The head flattens the features, applies two hidden dense layers with ReLU
    and dropout, and computes the logits.

    Attributes:
      classes: number of network outputs.
      features: number of channels in the first level.
      feature_multipliers: per level, the factor by which the next level has more
        channels.
      downsample_factors: per level, the factors (z, y, x) of the max-pool.
      convolutions: per level, the number of convolutions.
      dense_features: number of outputs of each hidden dense layer.
      dropout: probability that an output of a hidden dense layer is set to 0 while
        training.
      dtype: the floating-point type that the network computes in.
      head_sharding: how the inputs and outputs [batch, …] of the hidden dense layers
        are split over the devices. With None the compiler decides.
    """

    classes: int
    features: int
    feature_multipliers: Sequence[int]
    downsample_factors: Sequence[Sequence[int]]
    convolutions: Sequence[int]
    dense_features: int
    dropout: float
    dtype: jnp.dtype = jnp.float32
    head_sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        levels = self._levels()
        x = x[..., None].astype(self.dtype)
        if train:
            x = self._features_of_batch(levels, x)
        else:
            x = self._features(levels, x)
        # The channels come first, because the dense weights of the original expect the
        # flattened features in this order.
        x = x.transpose(0, 4, 1, 2, 3).reshape(len(x), -1)
        x = self._gathered(x)
        for i in range(2):
            x = self._dense(x, self.dense_features, f"dense{i}")
            x = nn.relu(self._gathered(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return self._dense(x, self.classes, "logits").astype(jnp.float32)

    def _levels(self) -> _Levels:
        levels, channels, features = [], 1, self.features
        for level, multiplier in enumerate(self.feature_multipliers):
            layers = []
            for i in range(self.convolutions[level]):
                kernel, bias = Conv3D(features, name=f"level{level}_conv{i}")(channels)
                norm = BatchNorm(features, name=f"level{level}_norm{i}")
                layers.append((kernel, bias, norm))
                channels = features
            levels.append(layers)
            features *= multiplier
        return levels

    def _features_of_batch(self, levels: _Levels, x: jax.Array) -> jax.Array:
        for layers, factors in zip(levels, self.downsample_factors, strict=True):
            for kernel, bias, norm in layers:
                x = convolution.conv3d(x, kernel.astype(self.dtype))
                x = nn.relu(norm.of_batch(x, bias))
            x = max_pool(x, factors)
        return x

    def _features(self, levels: _Levels, x: jax.Array) -> jax.Array:
        """Computes the features for inference: convolutions include the batch norm."""
        folded = [
            [_folded(kernel, bias, norm, self.dtype) for kernel, bias, norm in layers]
            for layers in levels
        ]

        def features(x: jax.Array) -> jax.Array:
            for layers, factors in zip(folded, self.downsample_factors, strict=True):
                for kernel, bias in layers:
                    x = convolution.conv3d_relu(x, kernel, bias)
                x = max_pool(x, factors)
            return x

        if convolution.calls_library(self.dtype):
            return jax.lax.map(lambda crop: features(crop[None])[0], x)
        return features(x)

    def _gathered(self, x: jax.Array) -> jax.Array:
        if self.head_sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.head_sharding)

    def _dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
        return nn.Dense(
            features,
            kernel_init=_KERNEL_INIT,
            bias_init=_bias_init(x.shape[-1]),
            dtype=self.dtype,
            name=name,
        )(x)


class ResNet18(nn.Module):
    """The ResNet-18 of BANC: crops in, logits out.

    The input is [batch, z, y, x] with values in [-1, 1]. The output is float32
    [batch, classes]. The layout is torchvision's r3d_18 for one input channel: a stem,
    four layers of two residual blocks, the mean over all positions, and the logits.

    Attributes:
      classes: number of network outputs.
      dtype: the floating-point type that the network computes in.
      head_sharding: how the pooled features [batch, 512] are split over the devices.
        With None the compiler decides.
    """

    classes: int
    dtype: jnp.dtype = jnp.float32
    head_sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x[..., None].astype(self.dtype)
        kernel = _Kernel(64, (3, 7, 7), name="stem_conv")(1)
        norm = BatchNorm(64, name="stem_norm")
        x = nn.relu(_normalised(x, kernel, norm, (1, 2, 2), train))
        for layer, features in enumerate((64, 128, 256, 512), start=1):
            for i in range(2):
                stride = 2 if layer > 1 and i == 0 else 1
                name = f"layer{layer}_block{i}"
                x = _ResidualBlock(features, stride, name=name)(x, train)
        x = x.mean(axis=(1, 2, 3))
        if self.head_sharding is not None:
            x = jax.lax.with_sharding_constraint(x, self.head_sharding)
        dense = nn.Dense(
            self.classes,
            kernel_init=_RESNET_DENSE_INIT,
            dtype=self.dtype,
            name="logits",
        )
        return dense(x).astype(jnp.float32)


class _ResidualBlock(nn.Module):
    """Two convolutions whose result is added to a shortcut of the input.

    The first convolution and the shortcut have the stride. With stride 1 the shortcut
    is the input itself, because the number of features does not change then.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride,) * 3
        shortcut = x
        if self.stride > 1:
            kernel = _Kernel(self.features, (1, 1, 1), name="shortcut_conv")(
                x.shape[-1]
            )
            norm = BatchNorm(self.features, name="shortcut_norm")
            shortcut = _normalised(x, kernel, norm, strides, train)
        for i, each in enumerate((strides, (1, 1, 1))):
            kernel = _Kernel(self.features, (3, 3, 3), name=f"conv{i}")(x.shape[-1])
            norm = BatchNorm(self.features, name=f"norm{i}")
            x = _normalised(x, kernel, norm, each, train)
            x = nn.relu(x if i == 0 else x + shortcut)
        return x


class _Kernel(nn.Module):
    """The kernel of a convolution without bias; its size is odd along every axis."""

    features: int
    shape_zyx: tuple[int, int, int]

    @nn.compact
    def __call__(self, channels: int) -> jax.Array:
        shape = (*self.shape_zyx, channels, self.features)
        return self.param("kernel", _RESNET_KERNEL_INIT, shape, jnp.float32)


def _normalised(
    x: jax.Array,
    kernel: jax.Array,
    norm: BatchNorm,
    strides_zyx: tuple[int, int, int],
    train: bool,
) -> jax.Array:
    """Returns the batch norm of a convolution that has no bias of its own."""
    if train:
        return norm.of_batch(convolution.conv3d(x, kernel.astype(x.dtype), strides_zyx))
    kernel, bias = _folded(kernel, 0.0, norm, x.dtype)
    return convolution.conv3d(x, kernel, strides_zyx) + bias


def compute_dtype(config: ml_collections.ConfigDict) -> jnp.dtype:
    """Returns the floating-point type that the networks compute in.

    Raises:
      UserError: config.compute_dtype is neither float32 nor bfloat16.
    """
    dtype = config.get("compute_dtype", "float32")
    if dtype not in _DTYPES:
        raise UserError(
            f"config.compute_dtype is {dtype!r}; choose float32 or bfloat16"
        )
    return _DTYPES[dtype]


def from_config(
    config: ml_collections.ConfigDict,
    head_sharding: jax.sharding.NamedSharding | None = None,
) -> VGG3D | ResNet18:
    """Returns the network that a config describes.

    Args:
      config: the config of a run.
      head_sharding: how the features [batch, …] that enter the dense head are split
        over the devices. With None the compiler decides.

    Raises:
      UserError: the config names an unknown network or compute_dtype, has an impossible
        setting of VGG3D, or has a crop shape that the levels of VGG3D do not divide.
    """
    settings = config.model
    network = settings.get("network", "vgg3d")
    common: dict[str, Any] = {
        "classes": len(config.classes),
        "dtype": compute_dtype(config),
        "head_sharding": head_sharding,
    }
    if network == "resnet18":
        return ResNet18(**common)
    if network != "vgg3d":
        raise UserError(
            f"config.model.network is {network!r}; choose vgg3d or resnet18"
        )
    for name in ("features", "dense_features"):
        if settings[name] < 1:
            raise UserError(
                f"config.model.{name} is {settings[name]}; it must be at least 1"
            )
    if not 0 <= settings.dropout < 1:
        raise UserError(
            f"config.model.dropout is {settings.dropout}; it must be at least 0 and "
            "below 1"
        )
    if any(len(f) != 3 or min(f) < 1 for f in settings.downsample_factors):
        raise UserError(
            f"config.model.downsample_factors are {settings.downsample_factors}; each "
            "level needs three factors (z, y, x), and each must be at least 1"
        )
    levels = len(settings.downsample_factors)
    for name in ("feature_multipliers", "convolutions"):
        if len(settings[name]) != levels:
            raise UserError(
                f"config.model.{name} has {len(settings[name])} entries, but "
                f"config.model.downsample_factors has {levels} levels; give one entry "
                "for each level"
            )
    for axis, size in enumerate(config.crop_shape_zyx):
        factor = math.prod(factors[axis] for factors in settings.downsample_factors)
        if size % factor:
            raise UserError(
                f"config.crop_shape_zyx[{axis}] = {size} is not divisible by the "
                f"product {factor} of the downsample_factors along this axis; change "
                "the crop shape or the factors"
            )
    return VGG3D(
        **common,
        features=settings.features,
        feature_multipliers=tuple(settings.feature_multipliers),
        downsample_factors=tuple(map(tuple, settings.downsample_factors)),
        convolutions=tuple(settings.convolutions),
        dense_features=settings.dense_features,
        dropout=settings.dropout,
    )
