# SPDX-License-Identifier: Apache-2.0
"""Computes the 3D convolutions of the networks in the fastest way for the backend.

native    XLA's own 3D convolution. It uses cuDNN on a GPU and the matrix unit on a TPU.
library   The convolution of oneDNN, which is part of jaxlib's builds for x86. XLA runs
          it for a custom call with oneDNN's name. It is used on a CPU with float32,
          where it is 5 to 45 times faster than native: XLA has only a plain loop for
          three dimensions there.
sections  One 2D convolution, whose input channels are the channels of three
          neighbouring sections. It computes the same sums as a 3×3×3 convolution of
          stride 1, and is 2 to 7 times faster than native on a CPU. It is used on a CPU
          without the library, for bfloat16, and on several CPU devices, because XLA
          cannot split a custom call over devices.

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

# XLA does not document the name of the custom call and its configuration, and the
# process ends if oneDNN cannot read the configuration. So the library is only used with
# these versions, which have been tried. Other versions use `sections`.
_TRIED_JAXLIB = ("0.10", "0.12")
_TARGET = "__onednn$convolution"
_BIAS_RELU = ("BIAS", "RELU")


def conv3d(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int, int] = (1, 1, 1)
) -> jax.Array:
    """Returns the convolution of x with a kernel of odd size.

    Zeros are added on both sides of every axis, as many as half the kernel's size.

    Args:
      x: [batch, z, y, x, channels].
      kernel: [kz, ky, kx, channels, features].
      strides: the strides along z, y and x.

    Returns:
      [batch, z', y', x', features], where z' is z divided by its stride, rounded up.
    """
    lowering = _lowering(x.dtype)
    if lowering == "library":
        return _by_library(x, kernel, strides)
    if lowering == "sections" and _is_plain(kernel, strides):
        return _by_sections(x, kernel)
    return _native(x, kernel, strides)


def conv3d_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns max(0, convolution + bias), with stride 1.

    The function is for inference, because the library's version has no gradient.
    """
    if calls_library(x.dtype):
        return _library_call(x, kernel, (1, 1, 1), bias, fused=_BIAS_RELU)
    return jax.nn.relu(conv3d(x, kernel) + bias)


def calls_library(dtype: jnp.dtype) -> bool:
    """Returns whether networks that compute in `dtype` call the library here.

    If they do, XLA cannot store their compiled programs. Inference is then faster with
    one crop at a time, because the activations of one crop stay in the CPU's cache.
    """
    return _lowering(dtype) == "library"


def compiler_options() -> dict[str, str]:
    """Returns the options for `jax.jit` of a network.

    On a CPU they say what XLA computes with YNNPACK. By default these are also matrix
    products, but the dense head takes 2.2 times longer with YNNPACK than with Eigen
    (batches of 8 and 32). The sums over batches, for batch norm, stay with YNNPACK,
    because they take 12 times longer without it.
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
    """Returns whether XLA can call oneDNN here and oneDNN computes the right result."""
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
        except jax.errors.JaxRuntimeError:  # another CPU, or no such call
            return False
    # XLA cannot store a program that calls the library. If JAX is asked to keep
    # compiled programs, it warns about each of them. The warning is hidden, because
    # compiling a program again only takes a few seconds.
    warnings.filterwarnings("ignore", "Error writing persistent .*std::bad_alloc")
    return is_right


def _native(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int, int]
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        # With a stride, "SAME" would pad axes of even size only at their end.
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
    """Calls oneDNN's convolution.

    Args:
      fused: the operations that oneDNN applies to each sum, in this order.
    """
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
    # The gradient of a sum over neighbours is the sum over the mirrored neighbours.
    mirrored = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    by_x = _library_call(cotangent, mirrored, strides)
    return by_x, _kernel_gradient(x, cotangent)


_by_library.defvjp(_forward, _backward)


def _kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns the gradient by the kernel, [3, 3, 3, channels, features].

    Each of the 27 matrices is the product of the displaced x and the cotangent. These
    products are computed section by section, because one section fits into the cache.
    A row of the left matrix is a window of r + 2 voxels along x. A row of the right
    matrix has r voxels of each of three sections. So the matrices are wide enough even
    with few channels. Among the (r + 2) · r pairs of voxels, 3 · r pairs are displaced
    by -1, 0 or 1 along x, and only these pairs are used.
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
        # The section is padded here, while it is in the cache. A padded copy of all
        # sections would double the time.
        section = jnp.pad(section, ((1, 1), (1, 1), (0, 0)))
        starts = [section[:, i : i + width] for i in range(0, r + 2, r)]
        left = jnp.concatenate(
            [start.reshape(height + 2, rows, r * channels) for start in starts], -1
        )
        # Section z of x is multiplied by the cotangent of sections z + 1, z and z - 1.
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
