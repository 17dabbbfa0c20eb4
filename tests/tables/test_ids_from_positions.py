# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synister_jax.tables import ids_from_positions


def cantor_by_definition(*index: int) -> int:
    """Counts the voxels by the sum of the index, then by the sums of its first axes."""
    if len(index) == 1:
        return index[0] + 1
    total = sum(index)
    before = 1
    for k in range(len(index)):
        before = before * (total + k) // (k + 1)
    return before + cantor_by_definition(*index[:-1])


coordinate = st.integers(0, 660_000)


@given(coordinate, coordinate, coordinate)
def test_cantor_is_exact(z: int, y: int, x: int) -> None:
    [found] = ids_from_positions.cantor(np.array([[z, y, x]]))
    assert found == cantor_by_definition(z, y, x)


def test_cantor_counts_every_voxel_once() -> None:
    index = np.stack(np.mgrid[:12, :12, :12], axis=-1).reshape(-1, 3)
    index = index[index.sum(axis=1) < 12]
    assert sorted(ids_from_positions.cantor(index)) == list(range(1, len(index) + 1))


def test_cantor_refuses_what_would_not_be_exact() -> None:
    index = np.array([[0, 0, -1], [0, 0, 2_000_001], [1, 2, 3]])
    assert ids_from_positions.cantor_fits(index).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="negative or too large"):
        ids_from_positions.cantor(index)


def test_neuprint_ids_of_real_tbars() -> None:
    index = np.array([[17630, 11537, 25957], [0, 0, 2**21], [0, -1, 0]])
    # The first id is in the first line of the male-VNC acetylcholine table.
    assert ids_from_positions.neuprint(index).tolist() == [77537584185632101, -1, -1]
