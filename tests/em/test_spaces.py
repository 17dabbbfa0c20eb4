# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pytest

from synister_jax.base.errors import UserError
from synister_jax.em import spaces, volumes
from synister_jax.em.spaces import SPACES


def at(space: str, x: float, y: float, z: float, **options: object) -> list[float]:
    xyz = {name: np.array([v], float) for name, v in zip("xyz", (x, y, z), strict=True)}
    [position] = spaces.to_volume(SPACES[space], xyz, **options).tolist()
    return position


def test_catmaid_lies_one_section_above_the_container() -> None:
    # The example is from synistereq's test: z of 217440 becomes 217400.
    assert at("fafb-catmaid", 438817, 164242, 217440) == [217400, 164242, 438817]


def test_hemibrain_axes_are_turned_and_the_first_flipped() -> None:
    # neuPrint's voxel (x, y, z) becomes (X - x - 1, z, y), times 8 nm.
    position = at("hemibrain-neuprint", 100, 20, 3, shape_zyx=(34_427, 5, 7))
    assert position == [(34_427 - 100 - 1) * 8, 3 * 8, 20 * 8]
    with pytest.raises(UserError, match="--volume"):
        at("hemibrain-neuprint", 100, 20, 3)


def test_voxels_of_vnc_and_banc() -> None:
    assert at("malevnc-neuprint", 25957, 11537, 17630) == [141040, 92296, 207656]
    assert at("banc", 10.9, 20.1, 3.99) == [3 * 45, 20 * 4, 10 * 4]


def test_what_was_done_is_described() -> None:
    done = spaces.describe(SPACES["hemibrain-neuprint"], (9, 5, 7))
    assert done["shape_zyx"] == [9, 5, 7] and done["order_zyx"] == ("x", "z", "y")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> volumes.Volume:
    path = tmp_path_factory.mktemp("volume") / "raw.n5"
    volumes.write_n5(path, np.zeros((60, 200, 300), np.uint8), (40, 4, 4), (80, 0, 0))
    return volumes.open(str(path))


def positions(volume: volumes.Volume) -> np.ndarray:
    rng = np.random.default_rng(0)
    index = rng.uniform(0, np.array(volume.shape_zyx) - 1, (500, 3))
    return index * volume.voxel_size_nm_zyx + volume.offset_nm_zyx


def test_mistaken_units_are_named(volume: volumes.Volume) -> None:
    right = positions(volume)
    assert not spaces.outside(right, volume).any()
    assert spaces.doubt(right, volume) is None
    assert not spaces.look_like_voxels(right, volume)
    twice = right * volume.voxel_size_nm_zyx
    assert "once more" in spaces.doubt(twice, volume)
    assert "x, y, z" in spaces.doubt(right[:, ::-1], volume)
    assert "thousandths" in spaces.doubt(right * 1000, volume)
    assert spaces.doubt(right + 1e9, volume) is None  # outside for an unknown reason
    voxels = (right - volume.offset_nm_zyx) / volume.voxel_size_nm_zyx
    assert spaces.look_like_voxels(voxels + volume.offset_nm_zyx, volume)


def test_missing_positions_are_outside_and_no_ground_for_doubt(
    volume: volumes.Volume,
) -> None:
    lacking = np.full((3, 3), np.nan)
    assert spaces.outside(lacking, volume).all()
    assert spaces.doubt(lacking, volume) is None
    assert not spaces.look_like_voxels(lacking, volume)


def test_positions_reach_the_voxel_they_name(
    tmp_path: pathlib.Path, volume: volumes.Volume
) -> None:
    last = (np.array(volume.shape_zyx) - 1) * volume.voxel_size_nm_zyx
    last = last + volume.offset_nm_zyx
    beyond = last + np.diag(volume.voxel_size_nm_zyx)
    assert not spaces.outside(last[None], volume).any()
    assert spaces.outside(beyond, volume).all()
