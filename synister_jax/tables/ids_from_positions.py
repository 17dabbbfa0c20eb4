# SPDX-License-Identifier: Apache-2.0
"""Synapse ids that are computed from positions, in exact integers."""

import numpy as np

# Up to this sum z + y + x, every product in `cantor` fits int64. No EM volume is this
# long.
_LARGEST_SUM = 2_000_000
_BITS = 21  # a neuPrint id has this many bits for each coordinate


def cantor(index_vx_zyx: np.ndarray) -> np.ndarray:
    """Returns the Cantor number of each voxel, [n] int64, which is unique.

    With s = z + y + x and t = z + y, the number is s(s+1)(s+2)/6 + t(t+1)/2 + z + 1.
    funlib.math.cantor_number has the same formula, but divides floats, which is inexact
    for sums above about 300,000. This function computes in integers.

    Args:
      index_vx_zyx: voxel indices (z, y, x), [n, 3].

    Raises:
      ValueError: an index does not satisfy `cantor_fits`.
    """
    if not cantor_fits(index_vx_zyx).all():
        raise ValueError("voxel indices are negative or too large")
    index = np.asarray(index_vx_zyx, np.int64)
    total = index.sum(axis=1)
    z, pair = index[:, 0], index[:, 0] + index[:, 1]
    pyramid = total * (total + 1) // 2 * (total + 2) // 3
    return pyramid + pair * (pair + 1) // 2 + z + 1


def cantor_fits(index_vx_zyx: np.ndarray) -> np.ndarray:
    """Returns which voxel indices [n, 3] have an exact Cantor number, [n] bool.

    An index is not allowed to be negative, and z + y + x is at most 2,000,000.
    """
    index = np.asarray(index_vx_zyx)
    return (index >= 0).all(axis=1) & (index.sum(axis=1) <= _LARGEST_SUM)


def neuprint(index_vx_zyx: np.ndarray) -> np.ndarray:
    """Returns FlyEM's id of each voxel index [n, 3], [n] int64.

    The id is z << 42 | y << 21 | x. It is -1 if a coordinate does not fit 21 bits.
    """
    index = np.asarray(index_vx_zyx)
    fits = np.all((index >= 0) & (index < 1 << _BITS), axis=1)
    z, y, x = np.where(fits[:, None], index, 0).astype(np.int64).T
    return np.where(fits, (z << 2 * _BITS) | (y << _BITS) | x, -1)
