# SPDX-License-Identifier: Apache-2.0
"""How densely the synapses of a class lie, and the acceptance that makes up for it."""

from collections.abc import Sequence

import numpy as np
from scipy import spatial


def acceptance(
    positions_nm_zyx: np.ndarray, labels: np.ndarray, half_box_nm_zyx: Sequence[float]
) -> np.ndarray:
    """1/n for each of the synapses, [n] float64 in (0, 1].

    Drawn uniformly and kept with this probability, a synapse of a cluster is as likely
    as the whole of the cluster would be, as in the original's `RandomLocation`.

    Args:
      positions_nm_zyx: [n, 3], finite.
      labels: [n] of any integers; synapses of different labels do not count together.
      half_box_nm_zyx: n counts the synapses that differ by no more than this on every
        axis, itself included. On an axis with 0 only equal coordinates count.
    """
    scaled = np.empty(np.shape(positions_nm_zyx), np.float64)
    for axis, half in enumerate(half_box_nm_zyx):
        if half > 0:
            scaled[:, axis] = positions_nm_zyx[:, axis] / half
        else:
            _, order = np.unique(positions_nm_zyx[:, axis], return_inverse=True)
            scaled[:, axis] = 2.0 * order  # different ones lie outside the radius of 1
    result = np.empty(len(scaled), np.float64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        tree = spatial.cKDTree(scaled[rows])
        # Sections are as far apart as a box may be half wide: rounding must not decide
        # on synapses at its very border.
        near = tree.query_ball_point(
            scaled[rows], 1 + 1e-9, p=np.inf, return_length=True
        )
        result[rows] = 1 / near
    return result
