# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import tensorstore as ts

from synister_jax.base.errors import UserError
from synister_jax.bulk import grids
from synister_jax.bulk.grids import Grid
from synister_jax.em import layouts
from synister_jax.tables import synapses

CLASSES = ("gaba", "acetylcholine", "dopamine")
# No axis is a multiple of the chunk, and begin and step differ on every axis.
GRID = Grid((40.0, -8.0, 100.0), (281.0, 552.0, 239.0), (40.0, 8.0, 2.0))
SHAPE_ZYX = (7, 70, 70)
ABOUT = {"run": "runs/a", "step": 1000}


def probabilities(positions_nm_zyx: np.ndarray) -> np.ndarray:
    """Returns different values for every position: [n, 3] -> [n, classes] float32."""
    z, y, x = positions_nm_zyx.T
    values = [(z + 2 * y + 3 * x) / 5000, z * x / 1e6, y / 1000]
    return np.stack(values, axis=1).astype(np.float32)


def pieces(grid: Grid, rows: int) -> Iterator[np.ndarray]:
    for batch in grid.batches(rows):
        table = pa.Table.from_batches([batch])
        yield probabilities(synapses.positions_nm_zyx(table))


def write(path: pathlib.Path, rows: int = 1000) -> None:
    grids.write_zarr(path, GRID, CLASSES, pieces(GRID, rows), ABOUT)


def read(path: pathlib.Path) -> np.ndarray:
    kvstore = {"driver": "file", "path": f"{path / '0'}/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}).result().read().result()


def read_json(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def contents(path: pathlib.Path) -> dict[str, bytes]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def decode_blosc(stored: bytes) -> bytes:
    """Decodes a Blosc 1 chunk (header, zstd blocks) as README_CHUNK_FORMAT says."""
    _, _, flags, typesize, size, block, whole = struct.unpack("<BBBBIII", stored[:16])
    assert whole == len(stored)
    if flags & 2:  # not compressed
        return stored[16:]
    assert flags >> 5 == 4, "zstd"
    result = b""
    blocks = math.ceil(size / block)
    for start in struct.unpack(f"<{blocks}I", stored[16 : 16 + 4 * blocks]):
        here = min(block, size - len(result))
        splits = typesize if not flags & 16 and here == block else 1
        plain = b""
        for _ in range(splits):
            [length] = struct.unpack("<I", stored[start : start + 4])
            part = stored[start + 4 : start + 4 + length]
            start += 4 + length
            if length < here // splits:
                part = pa.decompress(part, here // splits, codec="zstd", asbytes=True)
            plain += part
        if flags & 1:  # shuffled: first the first byte of all numbers, and so on
            kept = here // typesize * typesize
            planes = np.frombuffer(plain[:kept], np.uint8).reshape(typesize, -1)
            plain = planes.T.tobytes() + plain[kept:]
        result += plain
    return result


def test_points_are_rows_of_a_synapse_table_z_slowest() -> None:
    grid = Grid((10.0, 0.0, -1.0), (30.0, 6.0, 1.0), (10.0, 2.0, 1.0))
    assert grid.shape_zyx == (2, 3, 2) and len(grid) == 12
    table = pa.Table.from_batches(grid.batches(rows=5))
    assert table.schema.equals(synapses.SCHEMA)
    assert [len(chunk) for chunk in table["z_nm"].chunks] == [5, 5, 2]
    assert table["synapse_id"].to_pylist() == list(range(12))
    expected = list(itertools.product((10, 20), (0, 2, 4), (-1, 0)))
    np.testing.assert_array_equal(synapses.positions_nm_zyx(table), expected)
    for name in set(table.column_names) - {"synapse_id", *synapses.POSITION}:
        assert table[name].null_count == 12
    assert synapses.conform(table, "the grid").num_rows == 12


@pytest.mark.parametrize(
    ("begin", "end", "step", "points"),
    [
        (0, 80, 40, 2),  # the grid does not include its end
        (0, 80.5, 40, 3),
        (-40, 1, 40, 2),
        (0, 1, 40, 1),
        (0.1, 0.4, 0.1, 3),  # in floats, (0.4 - 0.1) / 0.1 is above 3
        (0, 0.3, 0.1, 3),
    ],
)
def test_roi_is_half_open(begin: float, end: float, step: float, points: int) -> None:
    grid = Grid.of([f"{begin}:{end}", "0:1", "0:1"], [f"{step}", "1", "1"])
    assert grid.shape_zyx == (points, 1, 1)
    [batch] = grid.batches()
    assert max(batch["z_nm"].to_pylist()) < end
    assert begin + points * step >= end


def test_a_batch_of_the_largest_grid_is_made_alone() -> None:
    grid = Grid.of(["0:1048576", "0:1024", "0:1024"], ["1", "1", "1"])
    assert len(grid) == 2**40
    assert len(next(grid.batches())) == 65_536


@pytest.mark.parametrize(
    ("roi", "step", "message"),
    [
        ("0:1,0:1", "1,1,1", "--roi_nm_zyx=0:1,0:1: the flag takes three ranges"),
        ("0:1,0:1,0", "1,1,1", "--roi_nm_zyx=0:1,0:1,0: the flag takes three ranges"),
        ("0:1,0:1,0:1:2", "1,1,1", "--roi_nm_zyx=.*three ranges"),
        ("", "1,1,1", "--roi_nm_zyx=.*three ranges"),
        ("0:1,0:1,0:a", "1,1,1", "--roi_nm_zyx=.*finite numbers"),
        ("0:1,0:1,:1", "1,1,1", "--roi_nm_zyx=.*finite numbers"),
        ("0:1,0:1,0:inf", "1,1,1", "--roi_nm_zyx=.*finite numbers"),
        ("nan:1,0:1,0:1", "1,1,1", "--roi_nm_zyx=.*finite numbers"),
        ("0:1,5:5,0:1", "1,1,1", "--roi_nm_zyx=.*5:5 is empty"),
        ("0:1,5:4,0:1", "1,1,1", "--roi_nm_zyx=.*5:4 is empty"),
        ("0:1,0:1,0:1", "1,1", "--step_nm_zyx=1,1: the flag takes three numbers"),
        ("0:1,0:1,0:1", "1,x,1", "--step_nm_zyx=1,x,1: the flag takes three numbers"),
        ("0:1,0:1,0:1", "1,0,1", "--step_nm_zyx=1,0,1: give positive numbers"),
        ("0:1,0:1,0:1", "1,-1,1", "--step_nm_zyx=1,-1,1: give positive numbers"),
        ("0:1,0:1,0:1", "1,nan,1", "--step_nm_zyx=1,nan,1: give positive numbers"),
        ("0:1048577,0:1024,0:1024", "1,1,1", "--step_nm_zyx=1,1,1 is too small"),
        ("0:1e300,0:1,0:1", "1e-300,1,1", "--step_nm_zyx=1e-300,1,1 is too small"),
        ("-1e308:1e308,0:1,0:1", "1,1,1", "--step_nm_zyx=1,1,1 is too small"),
        ("1e17:1.0000000000000002e17,0:1,0:1", "1,1,1", "--step_nm_zyx=.* too small"),
        # The z axis has too many points, although y and x are shorter than a step.
        ("0:1e13,0:1,0:1", "1,1000,1000", "--step_nm_zyx=.* too small"),
    ],
)
def test_flags_are_refused_by_name(roi: str, step: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grid.of(roi.split(","), step.split(","))


def test_values_lie_where_they_were_predicted(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "p.zarr")
    array = read(tmp_path / "p.zarr")
    assert GRID.shape_zyx == SHAPE_ZYX
    assert array.shape == (3, *SHAPE_ZYX) and array.dtype == np.float32
    index = np.indices(SHAPE_ZYX).reshape(3, -1).T
    positions = index * GRID.step_nm_zyx + np.asarray(GRID.begin_nm_zyx)
    expected = probabilities(positions).T.reshape(array.shape)
    np.testing.assert_array_equal(array, expected)


def test_chunks_are_what_zarr_says(tmp_path: pathlib.Path) -> None:
    """The chunk is decoded by hand, without a reader of Zarr.

    zarr-specs.readthedocs.io/en/latest/v2/v2.0.html says: a chunk is a little-endian
    array in C order. Chunks at the edges also have the full chunk shape. The key has
    the indices of the chunk; `dimension_separator` "/" makes a folder of every index.
    """
    write(tmp_path / "p.zarr")
    zarray = read_json(tmp_path / "p.zarr" / "0" / ".zarray")
    assert zarray["chunks"] == [1, 7, 64, 64]
    names = {f"0/{c}/0/{y}/{x}" for c in range(3) for y in (0, 1) for x in (0, 1)}
    metadata = {".zgroup", ".zattrs", "0/.zarray", "0/.zattrs"}
    assert set(contents(tmp_path / "p.zarr")) == names | metadata
    z, y, x = 5, 66, 3  # the point is in the chunk (2, 0, 1, 0)
    stored = decode_blosc((tmp_path / "p.zarr" / "0/2/0/1/0").read_bytes())
    chunk = np.frombuffer(stored, "<f4").reshape(7, 64, 64)
    assert chunk[z, y - 64, x] == np.float32((-8 + 66 * 8) / 1000)
    stored = decode_blosc((tmp_path / "p.zarr" / "0/1/0/1/1").read_bytes())
    chunk = np.frombuffer(stored, "<f4").reshape(7, 64, 64)
    assert chunk[z, 1, 5] == np.float32((40 + 5 * 40) * (100 + (64 + 5) * 2) / 1e6)
    assert np.isnan(chunk[:, 6:]).all() and np.isnan(chunk[:, :, 6:]).all()


def test_metadata_is_ome_zarr_0_4(tmp_path: pathlib.Path) -> None:
    """The metadata follows ngff.openmicroscopy.org/0.4, as checked by hand.

    The sections axes, coordinateTransformations and multiscales say: The format is
    Zarr 2 with nested chunks. There MUST be one axis per dimension of the array, in the
    same order, the channel before space, with unique names. Axes SHOULD have a type and
    a unit of UDUNITS-2. Every data set MUST have one scale and then at most one
    translation, both with one number per axis. Name and version SHOULD be there. The
    layout also needs `_ARRAY_DIMENSIONS`.
    """
    write(tmp_path / "p.zarr")
    assert read_json(tmp_path / "p.zarr" / ".zgroup") == {"zarr_format": 2}
    attributes = read_json(tmp_path / "p.zarr" / ".zattrs")
    assert attributes == {
        "multiscales": [
            {
                "version": "0.4",
                "name": "p",
                "axes": [
                    {"name": "c", "type": "channel"},
                    {"name": "z", "type": "space", "unit": "nanometer"},
                    {"name": "y", "type": "space", "unit": "nanometer"},
                    {"name": "x", "type": "space", "unit": "nanometer"},
                ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [1, 40, 8, 2]},
                            {"type": "translation", "translation": [0, 40, -8, 100]},
                        ],
                    }
                ],
            }
        ],
        "_ARRAY_DIMENSIONS": ["c", "z", "y", "x"],
        "classes": list(CLASSES),
        "synister_jax": ABOUT,
    }


def test_array_is_one_that_neuroglancer_reads(tmp_path: pathlib.Path) -> None:
    """The array has only what Neuroglancer's reader of Zarr accepts.

    Neuroglancer, src/datasource/zarr/metadata/parse.ts (parseV2Metadata), accepts order
    C or F, a given `dimension_separator`, float32 with the fill value "NaN", blosc with
    cname, clevel and shuffle, and no filters.
    """
    write(tmp_path / "p.zarr")
    assert read_json(tmp_path / "p.zarr" / "0" / ".zarray") == {
        "zarr_format": 2,
        "shape": [3, *SHAPE_ZYX],
        "chunks": [1, 7, 64, 64],
        "dtype": "<f4",
        "fill_value": "NaN",
        "order": "C",
        "filters": None,
        "dimension_separator": "/",
        "compressor": {
            "id": "blosc",
            "cname": "zstd",
            "clevel": 5,
            "shuffle": 1,
            "blocksize": 0,
        },
    }


def test_array_says_where_it_lies_as_daisy_does(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "p.zarr")
    attributes = read_json(tmp_path / "p.zarr" / "0" / ".zattrs")
    expected = (GRID.step_nm_zyx, GRID.begin_nm_zyx)
    metadata = {"attributes": attributes}
    assert layouts.physical_nm("zarr", metadata, (0, 1, 2), "p") == expected
    assert attributes["units"] == ["nm"] * 3


@pytest.mark.parametrize("rows", [7, 1000, 4900, 10_000, 100_000])
def test_bytes_do_not_depend_on_the_pieces(
    rows: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every slab has two sections, and the last slab has one.
    monkeypatch.setattr(grids, "_SLAB_BYTES", 2 * 3 * 70 * 70 * 4)
    write(tmp_path / "a" / "p.zarr", 5000)
    write(tmp_path / "b" / "p.zarr", rows)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    zarray = read_json(tmp_path / "a" / "p.zarr" / "0" / ".zarray")
    assert zarray["chunks"] == [1, 2, 64, 64]
    write_whole = tmp_path / "whole.zarr"
    monkeypatch.undo()
    write(write_whole)
    np.testing.assert_array_equal(read(write_whole), read(tmp_path / "a" / "p.zarr"))


def test_no_prediction_is_nan_and_takes_no_room(tmp_path: pathlib.Path) -> None:
    grid = Grid((0.0, 0.0, 0.0), (2.0, 65.0, 65.0), (1.0, 1.0, 1.0))
    values = np.full((len(grid), 3), np.nan, np.float32)
    values[-1] = (0.5, 0.25, 0.25)
    grids.write_zarr(tmp_path / "p.zarr", grid, CLASSES, [values], {})
    array = read(tmp_path / "p.zarr")
    np.testing.assert_array_equal(array.reshape(3, -1).T, values)
    chunks = {n for n in contents(tmp_path / "p.zarr") if "/." not in n and n[0] != "."}
    assert chunks == {"0/0/0/1/1", "0/1/0/1/1", "0/2/0/1/1"}


@pytest.mark.parametrize("count", [0, 1, 34_299, 34_301, 40_000])
def test_wrong_number_of_predictions(count: int, tmp_path: pathlib.Path) -> None:
    assert len(GRID) == 34_300
    values = np.zeros((count, 3), np.float32)
    wrong = "more than 34,300" if count > 34_300 else f"{count:,} predictions"
    with pytest.raises(UserError, match=f"{wrong}.*34,300 points"):
        grids.write_zarr(tmp_path / "p.zarr", GRID, CLASSES, [values], ABOUT)
    assert not list(tmp_path.iterdir())


def test_wrong_number_of_classes(tmp_path: pathlib.Path) -> None:
    values = np.zeros((len(GRID), 1), np.float32)
    with pytest.raises(UserError, match=r"\[34300, 1\], but 3 classes"):
        grids.write_zarr(tmp_path / "p.zarr", GRID, CLASSES, [values], ABOUT)


def test_old_predictions_stay_until_the_new_are_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "p.zarr"
    write(path)
    before = contents(tmp_path)

    def stops() -> Iterator[np.ndarray]:
        yield np.ones((20_000, 3), np.float32)
        raise UserError("the volume is gone")

    with pytest.raises(UserError, match="the volume is gone"):
        grids.write_zarr(path, GRID, CLASSES, stops(), ABOUT)
    assert contents(tmp_path) == before
    ones = [np.ones((len(GRID), 3), np.float32)]
    grids.write_zarr(path, GRID, CLASSES, ones, {"step": 2000})
    assert (read(path) == 1).all()
    assert read_json(path / ".zattrs")["synister_jax"] == {"step": 2000}
    assert [p.name for p in tmp_path.iterdir()] == ["p.zarr"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "p.zarr"
    write(path)
    expected = contents(path)
    (tmp_path / "p.zarr.partial" / "0" / "9").mkdir(parents=True)
    # A run killed between its two renames leaves the old array as `.replaced` and the
    # new array as `.partial`.
    path.rename(tmp_path / "p.zarr.replaced")
    with pytest.raises(UserError, match="0 predictions"):
        grids.write_zarr(path, GRID, CLASSES, [], ABOUT)
    assert contents(tmp_path) == {f"p.zarr/{n}": b for n, b in expected.items()}
    (tmp_path / "p.zarr.partial" / "0" / "9").mkdir(parents=True)
    (tmp_path / "p.zarr.replaced").mkdir()
    write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["p.zarr"]
    assert contents(path) == expected


def test_a_chunk_that_cannot_be_written_is_a_user_error(tmp_path: pathlib.Path) -> None:
    def obstructed() -> Iterator[np.ndarray]:
        (tmp_path / "p.zarr.partial" / "0" / "1").write_text("where a folder must be")
        yield from pieces(GRID, 1000)

    with pytest.raises(UserError, match="cannot write .*p.zarr"):
        grids.write_zarr(tmp_path / "p.zarr", GRID, CLASSES, obstructed(), ABOUT)
    assert not (tmp_path / "p.zarr").exists()


def test_what_is_not_ours_is_not_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "volume.zarr").mkdir()
    (tmp_path / "volume.zarr" / ".zattrs").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name in ("volume.zarr", "file"):
        with pytest.raises(UserError, match=f"{name} exists and does not hold pred"):
            write(tmp_path / name)
    with pytest.raises(UserError, match="cannot write to .*file"):
        write(tmp_path / "file" / "p.zarr")
    assert set(contents(tmp_path)) == {"volume.zarr/.zattrs", "file"}
