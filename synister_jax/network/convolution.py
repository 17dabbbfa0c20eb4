# SPDX-License-Identifier: Apache-2.0
"""The networks' 3D convolutions, and how each backend computes them.

native    what XLA makes of a 3D convolution: cuDNN on a GPU, the matrix unit of a TPU.
library   oneDNN's convolution, which lies in jaxlib's builds for x86 and which XLA
          calls for a custom call of this name. On a CPU, float32: 5 to 45 times faster
          than native, where XLA has a loop for three dimensions.
sections  for 3×3×3 and stride 1, one 2D convolution whose input channels are those of
          three neighbouring sections: the same sums, 2 to 7 times faster than native on
          a CPU. Where the library is not to be had, for bfloat16, and on several CPU
          devices, over which XLA splits no custom call.

docs/speed.md has the measurements.
"""

import functools
import json
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

# The name of the custom call and its configuration are XLA's own affair: they are in
# no documentation, and a configuration that oneDNN cannot read ends the process.
# These versions have been tried; another one gets `sections`.
_TRIED_JAXLIB = ("0.10", "0.12")
_TARGET = "__onednn$convolution"
_BIAS_RELU = ("BIAS", "RELU")


def conv3d(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int, int] = (1, 1, 1)
) -> jax.Array:
    """[b, z, y, x, in], [kz, ky, kx, in, out] → [b, z', y', x', out].

    Zero padding of half the kernel, whose sizes are odd, on both sides.
    """
    lowering = _lowering(x.dtype)
    if lowering == "library":
        return _by_library(x, kernel, strides)
    if lowering == "sections" and _is_plain(kernel, strides):
        return _by_sections(x, kernel)
    return _native(x, kernel, strides)


def conv3d_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """max(0, convolution + bias), stride 1; the library's has no gradient."""
    if calls_library(x.dtype):
        return _library_call(x, kernel, (1, 1, 1), bias, fused=_BIAS_RELU)
    return jax.nn.relu(conv3d(x, kernel) + bias)


def calls_library(dtype: jnp.dtype) -> bool:
    """Whether networks that compute in `dtype` call the library here.

    Then XLA cannot keep their programs, and inference is faster one crop at a time,
    whose activations stay in the CPU's cache.
    """
    return _lowering(dtype) == "library"


def compiler_options() -> dict[str, str]:
    """For `jax.jit` of a network: what XLA leaves to YNNPACK on a CPU.

    Not matrix products, as it does by default: the dense head takes 2.2 times longer
    by YNNPACK than by Eigen (batches of 8 and 32). Sums over batches, for batch norm,
    take 12 times longer without it.
    """
    if jax.default_backend() != "cpu" or not _is_tried():
        return {}
    kinds = ("REDUCE", "INDIVIDUAL_CONVOLUTION")
    names = ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds)
    return {"xla_cpu_experimental_ynn_fusion_type": names}


def _is_plain(kernel: jax.Array, strides: tuple[int, int, int]) -> bool:
    return kernel.shape[:3] == (3, 3, 3) and strides == (1, 1, 1)


def _lowering(dtype: jnp.dtype) -> str:
    if jax.default_backend() != "cpu":
        return "native"
    if dtype == jnp.float32 and jax.device_count() == 1 and has_library():
        return "library"
    return "sections"


def _is_tried() -> bool:
    return jaxlib.__version__.startswith(tuple(f"{v}." for v in _TRIED_JAXLIB))


@functools.cache
def has_library() -> bool:
    """Whether XLA can call oneDNN here, and gets a convolution of it."""
    if not _is_tried():
        return False
    plain = (1, 1, 1)
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        x = jnp.asarray(rng.normal(size=(1, 3, 4, 5, 2)), jnp.float32)
        kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 2, 3)), jnp.float32)
        bias = jnp.asarray(rng.normal(size=3), jnp.float32)
        expected = jax.nn.relu(_native(x, kernel, plain) + bias)
        try:
            found = jax.jit(
                lambda x, kernel, bias: _library_call(
                    x, kernel, plain, bias, fused=_BIAS_RELU
                )
            )(x, kernel, bias)
            is_right = bool(jnp.allclose(found, expected, rtol=1e-4, atol=1e-4))
        except jax.errors.JaxRuntimeError:  # another kind of CPU, or no such target
            return False
    # XLA cannot store a program that calls the library. JAX, asked to keep compiled
    # programs, would say so of each; compiling one again takes a few seconds.
    warnings.filterwarnings("ignore", "Error writing persistent .*std::bad_alloc")
    return is_right


def _native(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int, int]
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        # Not "SAME": with a stride that pads even sizes on the far side alone.
        padding=[(size // 2, size // 2) for size in kernel.shape[:3]],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _by_sections(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, depth, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    neighbours = [padded[:, i : i + depth] for i in range(3)]
    sections = jnp.concatenate(neighbours, axis=-1)
    out = jax.lax.conv_general_dilated(
        sections.reshape(batch * depth, height, width, 3 * channels),
        kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, 3 * channels, -1),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out.reshape(batch, depth, height, width, -1)


# ------------------------------------------------------------------------- the library


def _library_call(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int, int],
    *bias: jax.Array,
    fused: Sequence[str] = (),
) -> jax.Array:
    """oneDNN's convolution, with what it is to do with each sum afterwards."""
    half = [size // 2 for size in kernel.shape[:3]]
    tensor = {"dims": 5, "data": {"feature_dim": 4, "spatial_dims": [1, 2, 3]}}
    filters = {
        "input_feature_dim": 3,
        "output_feature_dim": 4,
        "spatial_dims": [0, 1, 2],
    }
    config = {
        "dims": 5,
        "input": tensor,
        "kernel": {"dims": 5, "filter": filters},
        "output": tensor,
        "window": {
            "size": kernel.shape[:3],
            "pad_left": half,
            "pad_right": half,
            "strides": strides,
            "window_dilations": [1, 1, 1],
        },
        "fusions": {"ops": list(fused)},
        "feature_groups": 1,
    }
    sizes = [
        -(-size // stride) for size, stride in zip(x.shape[1:4], strides, strict=True)
    ]
    call = jax.ffi.ffi_call(
        _TARGET,
        jax.ShapeDtypeStruct((len(x), *sizes, kernel.shape[-1]), x.dtype),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )
    return call(x, kernel, *bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_library(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int, int]
) -> jax.Array:
    return _library_call(x, kernel, strides)


def _forward(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int, int]
) -> tuple[jax.Array, tuple]:
    return _library_call(x, kernel, strides), (x, kernel)


def _backward(
    strides: tuple[int, int, int], saved: tuple, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    if not _is_plain(kernel, strides):
        _, transpose = jax.vjp(functools.partial(_native, strides=strides), x, kernel)
        return transpose(cotangent)
    # The gradient of a sum over neighbours is the sum over the same ones, mirrored.
    mirrored = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    by_x = _library_call(cotangent, mirrored, strides)
    return by_x, _kernel_gradient(x, cotangent)


_by_library.defvjp(_forward, _backward)


def _kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """[3, 3, 3, in, out]: each of the 27 is a product of x, displaced, and cotangent.

    As matrix products over the voxels of one section, which fit the cache. A row of
    the left matrix is a window of r + 2 voxels along x, one of the right r voxels of
    three sections: so few channels make matrices wide enough. Of the (r + 2) · r pairs
    of voxels 3 · r are displaced by -1, 0 or 1.
    """
    batch, depth, height, width, channels = x.shape
    features = cotangent.shape[-1]
    r = 2 if width % 2 == 0 and max(channels, features) <= 24 else 1  # measured
    rows = width // r
    x = x.reshape(batch * depth, height, width, channels)
    cotangent = cotangent.reshape(batch * depth, height * rows, r * features)

    def cotangent_at(index: jax.Array, dz: int) -> jax.Array:
        z = index % depth + dz
        there = jax.lax.dynamic_index_in_dim(cotangent, index + dz, keepdims=False)
        return jnp.where((z >= 0) & (z < depth), there, 0)

    def add_section(
        sums: list[jax.Array], index: jax.Array
    ) -> tuple[list[jax.Array], None]:
        section = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        # Padded here, in the cache: a padded copy of all x would double the time.
        section = jnp.pad(section, ((1, 1), (1, 1), (0, 0)))
        starts = [section[:, i : i + width] for i in range(0, r + 2, r)]
        left = jnp.concatenate(
            [start.reshape(height + 2, rows, r * channels) for start in starts], -1
        )
        # x of section z meets the cotangent of z + 1, z and z - 1.
        right = jnp.concatenate([cotangent_at(index, dz) for dz in (1, 0, -1)], -1)
        return [
            total
            + jax.lax.dot_general(
                left[dy : dy + height].reshape(height * rows, -1),
                right,
                (((0,), (0,)), ((), ())),
            )
            for dy, total in enumerate(sums)
        ], None

    zeros = jnp.zeros(((r + 2) * channels, 3 * r * features), x.dtype)
    sums, _ = jax.lax.scan(add_section, [zeros] * 3, jnp.arange(batch * depth))
    # [dy, voxel of the window, in, dz, voxel of the row, out]
    pairs = jnp.stack(sums).reshape(3, r + 2, channels, 3, r, features)
    gradient = sum(pairs[:, i : i + 3, :, :, i] for i in range(r))
    assert isinstance(gradient, jax.Array)  # r is not 0
    return gradient.transpose(3, 0, 1, 2, 4)
