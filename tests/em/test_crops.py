# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pytest

from synister_jax.base.errors import UserError
from synister_jax.em import crops, volumes
from tests.helpers.volume_formats import (
    ARRAY_ZYX,
    CHUNK_ZYX,
    JPEG_MAKERS,
    MAKERS,
    SHAPE_ZYX,
    VOXEL_SIZE_NM_ZYX,
    make_n5,
)


@pytest.fixture(params=MAKERS)
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    MAKERS[request.param](tmp_path / "volume")
    return tmp_path / "volume"


def test_synapse_sits_at_half_the_crop(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    index = np.array([[10, 15, 20]])
    position = index * VOXEL_SIZE_NM_ZYX + volume.offset_nm_zyx
    starts = crops.starts_vx_zyx(position, (4, 8, 6), volume)
    [crop] = crops.read(volume, starts, (4, 8, 6))
    assert not crop.unreadable
    assert crop.voxels[2, 4, 3] == ARRAY_ZYX[10, 15, 20]


def test_crop_start_rounds_half_to_even(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    half = np.array([[0.5, 0, 0], [1.5, 0, 0], [2.5, 0, 0]])
    position = half * VOXEL_SIZE_NM_ZYX + volume.offset_nm_zyx
    starts = crops.starts_vx_zyx(position, (4, 4, 4), volume)
    assert starts[:, 0].tolist() == [-2, 0, 0]


def test_crops_over_the_border_are_zero_outside(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    shape = (6, 10, 10)
    starts = np.array([[-3, 25, 35], [0, 0, 0], [20, 0, 0], [14, 20, 30], [-6, 0, 0]])
    status = crops.border_status(starts, shape, volume)
    expected = ["partly_outside", "ok", "outside", "ok", "outside"]
    assert status.tolist() == expected
    padded = np.pad(ARRAY_ZYX, 10)
    for start, crop in zip(starts, crops.read(volume, starts, shape), strict=True):
        z, y, x = start + 10
        np.testing.assert_array_equal(
            crop.voxels, padded[z : z + 6, y : y + 10, x : x + 10], strict=True
        )
        assert not crop.unreadable


@pytest.mark.parametrize("kind", MAKERS)
def test_missing_chunk_is_flagged_and_its_neighbours_are_read(
    tmp_path: pathlib.Path, kind: str
) -> None:
    stored = ARRAY_ZYX.copy()
    stored[8:16, 0:16, 16:32] = 0  # a whole chunk of zeros is not stored
    MAKERS[kind](tmp_path / "v", stored)
    volume = volumes.open(str(tmp_path / "v"))
    starts = np.array([[6, 10, 10], [0, 0, 0]])
    crop, other = crops.read(volume, starts, (8, 12, 12))
    assert crop.unreadable == ((8, 0, 16),) and not other.unreadable
    np.testing.assert_array_equal(crop.voxels, stored[6:14, 10:22, 10:22])
    np.testing.assert_array_equal(other.voxels, stored[:8, :12, :12])


@pytest.mark.parametrize("kind", [*MAKERS, *JPEG_MAKERS])
@pytest.mark.parametrize("left", [0, 20])
def test_chunks_cut_short_are_flagged(
    tmp_path: pathlib.Path, kind: str, left: int
) -> None:
    (MAKERS | JPEG_MAKERS)[kind](tmp_path)
    metadata = (".zarray", ".zattrs", "zarr.json", "attributes.json", "info")
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name not in metadata:
            path.write_bytes(path.read_bytes()[:left])
    volume = volumes.open(str(tmp_path))
    [crop] = crops.read(volume, np.array([[4, 0, 0]]), (8, 16, 16))
    assert crop.unreadable == ((0, 0, 0), (8, 0, 0))
    assert not crop.voxels.any()


def test_a_chunk_that_is_back_is_read(tmp_path: pathlib.Path) -> None:
    """The volume's cache still lacks the chunk, but `crops.read` finds it."""
    make_n5(tmp_path)
    (tmp_path / "0" / "0" / "0").rename(tmp_path / "away")
    volume = volumes.open(str(tmp_path))
    with pytest.raises(ValueError, match="NOT_FOUND"):
        volume.read((0, 0, 0), (4, 4, 4))
    (tmp_path / "away").rename(tmp_path / "0" / "0" / "0")
    with pytest.raises(ValueError, match="NOT_FOUND"):
        volume.read((0, 0, 0), (4, 4, 4))
    [crop] = crops.read(volume, np.zeros((1, 3), int), (8, 16, 16))
    assert not crop.unreadable
    np.testing.assert_array_equal(crop.voxels, ARRAY_ZYX[:8, :16, :16])


def test_a_volume_that_vanishes_is_not_a_volume_without_chunks(
    path: pathlib.Path,
) -> None:
    volume = volumes.open(str(path))
    starts = np.array([[0, 0, 0], [8, 16, 16], [16, 16, 16]])
    reading = crops.read(volume, starts, (4, 8, 8), bytes_in_flight=1)
    assert not next(reading).unreadable
    path.rename(path.with_name("unmounted"))
    with pytest.raises(UserError, match="no longer there: .* cannot be found; .*kept"):
        list(reading)


def test_chunk_order_visits_each_chunk_once(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, np.array(SHAPE_ZYX) - 4, (200, 3))
    order = crops.order(starts, (4, 4, 4), volume)
    assert sorted(order) == list(range(200))
    cells = [tuple(c) for c in (starts[order] + 2) // CHUNK_ZYX]
    changes = 1 + sum(a != b for a, b in zip(cells, cells[1:], strict=False))
    assert changes == len(set(cells))


def test_bounded_read_ahead_gives_the_same_crops(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    starts = np.random.default_rng(0).integers(-4, 30, (40, 3))
    few = list(crops.read(volume, starts, (4, 4, 4), bytes_in_flight=100))
    many = list(crops.read(volume, starts, (4, 4, 4)))
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a.voxels, b.voxels)
