# SPDX-License-Identifier: Apache-2.0
"""What every network gets: the middle of a record, from bytes to [-1, 1]."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def centre(records: jax.Array, crop_shape_zyx: Sequence[int]) -> jax.Array:
    """The middle of each record, scaled as in the original; no randomness.

    Args:
      records: uint8 [batch, z, y, x], with or without context around the crop.
      crop_shape_zyx: what the network takes.

    Returns:
      float32 [batch, *crop_shape_zyx], a voxel v being v / 255 · 2 - 1.
    """
    middle = tuple(
        slice((r - c) // 2, (r - c) // 2 + c)
        for r, c in zip(records.shape[1:], crop_shape_zyx, strict=True)
    )
    return records[(slice(None), *middle)].astype(jnp.float32) / 255 * 2 - 1
