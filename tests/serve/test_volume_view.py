# SPDX-License-Identifier: Apache-2.0
"""Tests of a volume as Neuroglancer's precomputed image, read chunk by chunk."""

import itertools
import pathlib
import shutil

import numpy as np
import pytest
import tensorstore as ts

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.em import volumes
from synister_jax.serve import volume_view

ANISOTROPIC, CUBIC = (40.0, 4.0, 4.0), (8.0, 8.0, 8.0)


def _volume(
    folder: pathlib.Path,
    shape_zyx: tuple[int, int, int],
    voxel_nm_zyx: tuple[float, ...],
    offset_nm_zyx: tuple[float, ...] = (0, 0, 0),
) -> tuple[np.ndarray, volumes.Volume]:
    array = np.random.default_rng(0).integers(1, 256, shape_zyx, np.uint8)
    path = folder / "volume.n5"
    volumes.write_n5(path, array, voxel_nm_zyx, offset_nm_zyx, (16, 32, 32))
    return array, volumes.open(str(path))


def _names(info: dict) -> list[str]:
    """Returns the names of all chunks, as Neuroglancer's volume.md defines them."""
    [scale] = info["scales"]
    axes = []
    for size, chunk, offset in zip(
        scale["size"], scale["chunk_sizes"][0], scale["voxel_offset"], strict=True
    ):
        starts = range(0, size, chunk)
        axes.append([f"{offset + s}-{offset + min(s + chunk, size)}" for s in starts])
    return ["_".join(parts) for parts in itertools.product(*axes)]


@pytest.mark.parametrize(
    ("voxel_nm", "offset_nm", "chunk"),
    [
        (ANISOTROPIC, (0, 0, 0), [64, 64, 16]),
        (ANISOTROPIC, (400, -8, 4000), [64, 64, 16]),
        (CUBIC, (8, 16, 24), [64, 64, 64]),
    ],
)
def test_a_precomputed_reader_reads_the_volume(
    tmp_path: pathlib.Path,
    voxel_nm: tuple[float, ...],
    offset_nm: tuple[float, ...],
    chunk: list[int],
) -> None:
    array, volume = _volume(tmp_path, (21, 70, 130), voxel_nm, offset_nm)
    info = volume_view.info(volume)
    assert info["scales"][0]["chunk_sizes"] == [chunk]
    folder = tmp_path / "precomputed"
    (folder / "s0").mkdir(parents=True)
    files.write_json(folder / "info", info)
    for name in _names(info):
        starts, stops = volume_view.parse(name)
        (folder / "s0" / name).write_bytes(volume_view.chunk(volume, starts, stops))
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
    }
    store = ts.open(spec).result()
    read = store.read().result()[..., 0]
    np.testing.assert_array_equal(read, array.T)
    expected = np.divide(offset_nm, voxel_nm)[::-1]
    np.testing.assert_array_equal(store.domain.origin[:3], expected)
    units = [unit.multiplier for unit in store.dimension_units[:3]]
    assert units == list(voxel_nm[::-1])


@pytest.mark.parametrize(
    "name",
    [
        "0-64_0-64_0-17",  # too thick
        "0-64_0-64_1-17",  # off the grid
        "64-128_0-64_0-16",  # past the end, which is 100
        "128-192_0-64_0-16",
        "-64-0_0-64_0-16",
        "0-0_0-64_0-16",
        "9999999999-9999999999_0-64_0-16",
    ],
)
def test_chunks_that_the_grid_has_not(tmp_path: pathlib.Path, name: str) -> None:
    _, volume = _volume(tmp_path, (20, 70, 100), ANISOTROPIC)
    assert volume_view.chunk(volume, *volume_view.parse(name)) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "info",
        "0-64_0-64",
        "0-64_0-64_0-16.gz",
        "../0-64_0-64_0-16",
        "0-64_0-64_0-16_0-1",
        "٠-64_0-64_0-16",  # a digit of another script
        "0-64_0-64_0-99999999999",
        "0x0-64_0-64_0-16",
        "0-64_0-64_0-16\n",
    ],
)
def test_names_that_are_none(name: str) -> None:
    assert volume_view.parse(name) is None


def test_names_with_negative_places() -> None:
    assert volume_view.parse("-64-0_-8-56_0-16") == ((-64, -8, 0), (0, 56, 16))


def test_what_the_volume_lacks_is_black(tmp_path: pathlib.Path) -> None:
    array, volume = _volume(tmp_path, (16, 64, 64), ANISOTROPIC)
    (tmp_path / "volume.n5" / "1" / "0" / "0").unlink()  # x, y, z
    data = volume_view.chunk(volume, (0, 0, 0), (64, 64, 16))
    read = np.frombuffer(data, np.uint8).reshape(16, 64, 64)
    array[:, :32, 32:] = 0
    np.testing.assert_array_equal(read, array)


def test_volume_that_is_gone_is_no_black_one(tmp_path: pathlib.Path) -> None:
    _, volume = _volume(tmp_path, (16, 64, 64), ANISOTROPIC)
    shutil.rmtree(tmp_path / "volume.n5")
    with pytest.raises(UserError, match="no longer there"):
        volume_view.chunk(volume, (0, 0, 0), (64, 64, 16))
