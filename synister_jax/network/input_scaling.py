# SPDX-License-Identifier: Apache-2.0
"""Makes the input of a network: cuts the middle of a record and scales its values."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def centre(records: jax.Array, crop_shape_zyx: Sequence[int]) -> jax.Array:
    """Returns the middle of each record, scaled to [-1, 1] as in the original.

    Args:
      records: uint8 [batch, z, y, x], with or without a context margin around the crop.
      crop_shape_zyx: size of the network's input in voxels.

    Returns:
      float32 [batch, *crop_shape_zyx]; a voxel of value v becomes v / 255 · 2 - 1.
    """
    middle = tuple(
        slice((r - c) // 2, (r - c) // 2 + c)
        for r, c in zip(records.shape[1:], crop_shape_zyx, strict=True)
    )
    return records[(slice(None), *middle)].astype(jnp.float32) / 255 * 2 - 1
