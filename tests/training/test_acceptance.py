# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import numpy as np
import pytest

from synister_jax.training import input_pipeline


def brute_force(
    positions_nm_zyx: np.ndarray, labels: np.ndarray, half_box_nm_zyx: Sequence[float]
) -> np.ndarray:
    far = np.abs(positions_nm_zyx[:, None] - positions_nm_zyx[None])
    near = (far <= half_box_nm_zyx).all(axis=2) & (labels[:, None] == labels[None])
    return 1 / near.sum(axis=1)


@pytest.mark.parametrize(
    "half_box_nm_zyx", [(40, 40, 40), (0, 12.5, 40), (80, 0, 0), (0, 0, 0)]
)
def test_as_brute_force(half_box_nm_zyx: tuple[float, ...]) -> None:
    """The synapses are on a grid, so many of them are exactly on the box's border."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, (8, 80, 80), (1_500, 3))
    positions = voxels * (40.0, 4.0, 4.0) + (1_234_560.0, 600_000.0, 300_000.0)
    labels = rng.integers(-1, 3, len(positions))
    found = input_pipeline.acceptance(positions, labels, half_box_nm_zyx)
    assert found.dtype == np.float64 and (found > 0).all() and (found <= 1).all()
    wanted = brute_force(positions, labels, half_box_nm_zyx)
    assert len(np.unique(wanted)) > 1
    np.testing.assert_array_equal(found, wanted)


def test_a_border_that_scaling_would_round_away() -> None:
    positions = np.array([[0.1, 0.0, 0.0], [0.4, 0.0, 0.0], [0.71, 0.0, 0.0]])
    found = input_pipeline.acceptance(positions, np.zeros(3, int), (0.3, 1, 1))
    assert found.tolist() == [0.5, 0.5, 1.0]


def test_synapses_at_one_position() -> None:
    positions = np.tile([[40.0, 8.0, 4.0]], (5, 1))
    labels = np.array([0, 0, 0, 1, 2])
    for half_box in [(40, 40, 40), (0, 0, 0)]:
        found = input_pipeline.acceptance(positions, labels, half_box)
        assert found.tolist() == [1 / 3, 1 / 3, 1 / 3, 1, 1]


def test_kept_synapses_weigh_as_much_as_their_clusters() -> None:
    """Every cluster (1 to 40 synapses) gives one accepted synapse on average."""
    sizes = np.arange(1, 41)
    cluster = np.repeat(np.arange(40), sizes)
    positions = np.zeros((len(cluster), 3))
    positions[:, 2] = cluster * 1_000 + np.arange(len(cluster)) % 30
    found = input_pipeline.acceptance(
        positions, np.zeros(len(cluster), int), (40, 40, 40)
    )
    np.testing.assert_allclose(np.bincount(cluster, found), 1)


def test_no_synapses() -> None:
    found = input_pipeline.acceptance(np.zeros((0, 3)), np.zeros(0, int), (40, 40, 40))
    assert found.shape == (0,)
