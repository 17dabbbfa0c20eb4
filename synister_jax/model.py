# SPDX-License-Identifier: Apache-2.0
"""The published networks in Flax Linen: VGG3D, and the ResNet-18 of BANC.

Both compute in `dtype`; parameters, batch statistics and the sums that these are made
of stay float32, and so do the logits.
"""

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
# Those of torchvision's video ResNets: He et al. 2015, and N(0, 0.01) for the logits.
_RESNET_KERNEL_INIT = initializers.variance_scaling(2, "fan_out", "normal")
_RESNET_DENSE_INIT = initializers.normal(0.01)

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _bias_init(fan_in: int) -> initializers.Initializer:
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv3D(nn.Module):
    """3×3×3 convolution with bias, stride 1, zero padding 1."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        shape = (3, 3, 3, channels, self.features)
        kernel = self.param("kernel", _KERNEL_INIT, shape, jnp.float32)
        bias = self.param(
            "bias", _bias_init(27 * channels), (self.features,), jnp.float32
        )
        return convolution.conv3d(x, kernel.astype(self.dtype)) + bias.astype(
            self.dtype
        )


def _batch_norm(train: bool, dtype: jnp.dtype, name: str) -> nn.BatchNorm:
    """PyTorch's: momentum 0.1 there is 0.9 here."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        name=name,
    )


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

    Attributes:
      head_sharding: of what enters and leaves the hidden dense layers [batch, …],
        where these are split over devices. None leaves it to the compiler.
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
        x = x[..., None].astype(self.dtype)
        features = self.features
        for level, factors in enumerate(self.downsample_factors):
            for i in range(self.convolutions[level]):
                x = Conv3D(features, self.dtype, name=f"level{level}_conv{i}")(x)
                x = _batch_norm(train, self.dtype, f"level{level}_norm{i}")(x)
                x = nn.relu(x)
            x = _max_pool(x, factors)
            features *= self.feature_multipliers[level]
        # Channels first, so that the original's dense weights fit as they are.
        x = x.transpose(0, 4, 1, 2, 3).reshape(len(x), -1)
        x = self._gathered(x)
        for i in range(2):
            x = self._dense(x, self.dense_features, f"dense{i}")
            x = nn.relu(self._gathered(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return self._dense(x, self.classes, "logits").astype(jnp.float32)

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
    """[batch, z, y, x] in [-1, 1] → logits [batch, classes].

    The layout of torchvision's r3d_18 for one input channel: a stem, four layers of
    two residual blocks, mean over positions, logits.

    Attributes:
      head_sharding: of the pooled features [batch, 512]; None as for VGG3D.
    """

    classes: int
    dtype: jnp.dtype = jnp.float32
    head_sharding: jax.sharding.NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x[..., None].astype(self.dtype)
        x = _PaddedConv3D(64, (3, 7, 7), (1, 2, 2), self.dtype, name="stem_conv")(x)
        x = nn.relu(_batch_norm(train, self.dtype, "stem_norm")(x))
        for layer, features in enumerate((64, 128, 256, 512), start=1):
            for i in range(2):
                stride = 2 if layer > 1 and i == 0 else 1
                name = f"layer{layer}_block{i}"
                x = _ResidualBlock(features, stride, self.dtype, name=name)(x, train)
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
    """Two convolutions beside a shortcut; the first and the shortcut have the stride.

    Without a stride the shortcut is the input itself: features do not change then.
    """

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride,) * 3
        shortcut = x
        if self.stride > 1:
            shortcut = _PaddedConv3D(
                self.features, (1, 1, 1), strides, self.dtype, name="shortcut_conv"
            )(x)
            shortcut = _batch_norm(train, self.dtype, "shortcut_norm")(shortcut)
        for i, each in enumerate((strides, (1, 1, 1))):
            x = _PaddedConv3D(
                self.features, (3, 3, 3), each, self.dtype, name=f"conv{i}"
            )(x)
            x = _batch_norm(train, self.dtype, f"norm{i}")(x)
            x = nn.relu(x if i == 0 else x + shortcut)
        return x


class _PaddedConv3D(nn.Module):
    """Convolution without bias, zero padding of half the (odd) kernel on both sides."""

    features: int
    kernel_shape_zyx: tuple[int, int, int]
    strides_zyx: tuple[int, int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_shape_zyx, x.shape[-1], self.features)
        kernel = self.param("kernel", _RESNET_KERNEL_INIT, shape, jnp.float32)
        kernel = kernel.astype(self.dtype)
        if self.kernel_shape_zyx == (3, 3, 3) and self.strides_zyx == (1, 1, 1):
            return convolution.conv3d(x, kernel)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=self.strides_zyx,
            # Not "SAME": with a stride that pads even sizes on the far side alone.
            padding=[(size // 2, size // 2) for size in self.kernel_shape_zyx],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )


def from_config(
    config: ml_collections.ConfigDict,
    head_sharding: jax.sharding.NamedSharding | None = None,
) -> VGG3D | ResNet18:
    """The network of a config.

    Args:
      head_sharding: of the features [batch, …] that enter the dense head.

    Raises:
      UserError: no such network or compute_dtype, or a crop that does not fit the
        levels of VGG3D.
    """
    settings = config.model
    network = settings.get("network", "vgg3d")
    dtype = config.get("compute_dtype", "float32")
    if dtype not in _DTYPES:
        raise UserError(
            f"config.compute_dtype is {dtype!r}; choose float32 or bfloat16"
        )
    common = {
        "classes": len(config.classes),
        "dtype": _DTYPES[dtype],
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
            raise UserError(f"config.model.{name} is {settings[name]}; at least 1")
    if not 0 <= settings.dropout < 1:
        raise UserError(
            f"config.model.dropout is {settings.dropout}; it lies in [0, 1)"
        )
    if any(len(f) != 3 or min(f) < 1 for f in settings.downsample_factors):
        raise UserError(
            f"config.model.downsample_factors are {settings.downsample_factors}; each "
            "level needs three (z, y, x) of at least 1"
        )
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
        **common,
        features=settings.features,
        feature_multipliers=tuple(settings.feature_multipliers),
        downsample_factors=tuple(map(tuple, settings.downsample_factors)),
        convolutions=tuple(settings.convolutions),
        dense_features=settings.dense_features,
        dropout=settings.dropout,
    )
