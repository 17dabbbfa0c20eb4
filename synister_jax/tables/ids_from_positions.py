# SPDX-License-Identifier: Apache-2.0
"""Synapse ids that are made of positions, in exact integers."""

import numpy as np

# z + y + x up to here keeps every product below in int64; no EM volume is as long.
_LARGEST_SUM = 2_000_000
_BITS = 21  # of each coordinate in a neuPrint id


def cantor(index_vx_zyx: np.ndarray) -> np.ndarray:
    """Cantor number of voxel indices [n, 3] >= 0, [n] int64, unique for each voxel.

    With s = z + y + x and t = z + y: s(s+1)(s+2)/6 + t(t+1)/2 + z + 1, as
    funlib.math.cantor_number counts, but in integers: its float division is inexact
    for sums above about 300,000.

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
    """[n] bool: neither negative nor so large that the number would not be exact."""
    index = np.asarray(index_vx_zyx)
    return (index >= 0).all(axis=1) & (index.sum(axis=1) <= _LARGEST_SUM)


def neuprint(index_vx_zyx: np.ndarray) -> np.ndarray:
    """z << 42 | y << 21 | x of voxel indices [n, 3], [n] int64, as FlyEM counts.

    -1 where a coordinate does not fit 21 bits.
    """
    index = np.asarray(index_vx_zyx)
    fits = np.all((index >= 0) & (index < 1 << _BITS), axis=1)
    z, y, x = np.where(fits[:, None], index, 0).astype(np.int64).T
    return np.where(fits, (z << 2 * _BITS) | (y << _BITS) | x, -1)
