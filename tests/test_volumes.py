# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import numpy as np
import pytest
import tensorstore as ts
from conftest import shared_data

from synister_jax import volumes
from synister_jax.command import UserError

SHAPE_ZYX = (20, 30, 40)
CHUNK_ZYX = (8, 16, 16)
VOXEL_SIZE_NM_ZYX = (40.0, 4.0, 5.0)
# Every voxel's value tells where it is: no two axes can be exchanged unnoticed.
Z, Y, X = np.indices(SHAPE_ZYX)
ARRAY_ZYX = ((Z * 31 + Y * 7 + X * 3) % 251).astype(np.uint8)


def make_n5(path: pathlib.Path) -> None:
    volumes.write_n5(path, ARRAY_ZYX, VOXEL_SIZE_NM_ZYX, (400, 80, 120), CHUNK_ZYX)


def make_zarr(path: pathlib.Path, driver: str) -> None:
    if driver == "zarr":
        metadata = {"shape": SHAPE_ZYX, "dtype": "|u1", "chunks": CHUNK_ZYX}
    else:
        grid = {"name": "regular", "configuration": {"chunk_shape": CHUNK_ZYX}}
        metadata = {"shape": SHAPE_ZYX, "data_type": "uint8", "chunk_grid": grid}
    kvstore = {"driver": "file", "path": f"{path}/"}
    spec = {"driver": driver, "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result().write(ARRAY_ZYX).result()
    attributes = {"resolution": VOXEL_SIZE_NM_ZYX, "offset": [400, 80, 120]}
    if driver == "zarr":
        (path / ".zattrs").write_text(json.dumps(attributes))
    else:
        stored = json.loads((path / "zarr.json").read_text())
        stored["attributes"] = attributes
        (path / "zarr.json").write_text(json.dumps(stored))


def make_precomputed(path: pathlib.Path) -> None:
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "multiscale_metadata": {
            "type": "image",
            "data_type": "uint8",
            "num_channels": 1,
        },
        "scale_metadata": {
            "size": SHAPE_ZYX[::-1],
            "voxel_offset": [24, 20, 10],
            "resolution": VOXEL_SIZE_NM_ZYX[::-1],
            "chunk_size": CHUNK_ZYX[::-1],
            "encoding": "raw",
        },
    }
    store = ts.open(spec, create=True).result()
    store.write(ARRAY_ZYX.transpose()[..., None]).result()


MAKERS = {
    "n5": make_n5,
    "zarr": lambda path: make_zarr(path, "zarr"),
    "zarr3": lambda path: make_zarr(path, "zarr3"),
    "precomputed": make_precomputed,
}


@pytest.fixture(params=MAKERS)
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    MAKERS[request.param](tmp_path / "volume")
    return tmp_path / "volume"


def test_every_format_is_zyx_with_its_voxel_size_and_offset(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    assert volume.shape_zyx == SHAPE_ZYX
    assert volume.chunk_shape_zyx == CHUNK_ZYX
    assert volume.voxel_size_nm_zyx == VOXEL_SIZE_NM_ZYX
    assert volume.offset_nm_zyx == (400, 80, 120)
    np.testing.assert_array_equal(volume.read((0, 0, 0), SHAPE_ZYX), ARRAY_ZYX)
    assert volume.read((3, 5, 7), (4, 6, 8)).item() == ARRAY_ZYX[3, 5, 7]


def test_a_url_and_a_spec_open_the_same_volume(path: pathlib.Path) -> None:
    volume = volumes.open(path.as_uri())
    assert volume.read((3, 5, 7), (4, 6, 8)).item() == ARRAY_ZYX[3, 5, 7]
    driver = volume.store.spec().to_json()["driver"]
    kvstore = {"driver": "file", "path": f"{path}/"}
    again = volumes.open(json.dumps({"driver": driver, "kvstore": kvstore}))
    np.testing.assert_array_equal(again.read((0, 0, 0), SHAPE_ZYX), ARRAY_ZYX)
    assert again.voxel_size_nm_zyx == VOXEL_SIZE_NM_ZYX


def test_a_spec_needs_no_slash_at_its_end(tmp_path: pathlib.Path) -> None:
    make_n5(tmp_path / "v")
    for kvstore in (
        {"driver": "file", "path": str(tmp_path / "v")},
        (tmp_path / "v").as_uri(),
    ):
        spec = json.dumps({"driver": "n5", "kvstore": kvstore})
        assert volumes.open(spec).offset_nm_zyx == (400, 80, 120)
        with pytest.raises(UserError, match="8×8×8 nm are expected"):
            volumes.open(spec, (8, 8, 8))


@pytest.mark.parametrize("named", ["xyz", "zyx", "yxz"])
def test_named_axes_are_honoured(tmp_path: pathlib.Path, named: str) -> None:
    """Store, voxel size and offset follow the names that the container gives."""
    order = ["zyx".index(name) for name in named]
    grid = {"chunk_shape": [CHUNK_ZYX[i] for i in order]}
    metadata = {
        "shape": [SHAPE_ZYX[i] for i in order],
        "data_type": "uint8",
        "dimension_names": list(named),
        "chunk_grid": {"name": "regular", "configuration": grid},
        "attributes": {
            "resolution": [VOXEL_SIZE_NM_ZYX[i] for i in order],
            "offset": [(400, 80, 120)[i] for i in order],
        },
    }
    kvstore = {"driver": "file", "path": f"{tmp_path}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result().write(ARRAY_ZYX.transpose(order)).result()
    stored = json.loads((tmp_path / "zarr.json").read_text())
    stored["attributes"] = metadata["attributes"]
    (tmp_path / "zarr.json").write_text(json.dumps(stored))
    volume = volumes.open(str(tmp_path))
    np.testing.assert_array_equal(volume.read((0, 0, 0), SHAPE_ZYX), ARRAY_ZYX)
    assert volume.voxel_size_nm_zyx == VOXEL_SIZE_NM_ZYX
    assert volume.offset_nm_zyx == (400, 80, 120)
    assert volume.chunk_shape_zyx == CHUNK_ZYX


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_ome_zarr(tmp_path: pathlib.Path, driver: str) -> None:
    make_zarr(tmp_path / "0", driver)
    make_zarr(tmp_path / "1", driver)
    for level in "01":
        if driver == "zarr":
            (tmp_path / level / ".zattrs").unlink()
        else:
            stored = json.loads((tmp_path / level / "zarr.json").read_text())
            del stored["attributes"]
            (tmp_path / level / "zarr.json").write_text(json.dumps(stored))
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]

    def level(path: str, factor: float) -> dict:
        scale = [0.04 * factor, 0.004 * factor, 0.005 * factor]
        steps = [{"type": "scale", "scale": scale}]
        steps += [{"type": "translation", "translation": [0.4, 0.08, 0.12]}]
        return {"path": path, "coordinateTransformations": steps}

    multiscales = [{"axes": axes, "datasets": [level("0", 1), level("1", 2)]}]
    if driver == "zarr":
        (tmp_path / ".zattrs").write_text(json.dumps({"multiscales": multiscales}))
    else:
        group = {"zarr_format": 3, "node_type": "group"}
        group["attributes"] = {"ome": {"version": "0.5", "multiscales": multiscales}}
        (tmp_path / "zarr.json").write_text(json.dumps(group))
    for path, factor in (("0", 1), ("1", 2)):
        volume = volumes.open(str(tmp_path / path))
        expected = np.array(VOXEL_SIZE_NM_ZYX) * factor
        np.testing.assert_allclose(volume.voxel_size_nm_zyx, expected)
        np.testing.assert_allclose(volume.offset_nm_zyx, (400, 80, 120))


@pytest.mark.parametrize(
    ("attributes", "size", "offset"),
    [
        (
            {"pixelResolution": {"dimensions": [5, 4, 40], "unit": "nm"}},
            (40, 4, 5),
            (0, 0, 0),
        ),
        ({"pixelResolution": [5, 4, 40]}, (40, 4, 5), (0, 0, 0)),
        (
            {"pixelResolution": [5, 4, 40], "downsamplingFactors": [2, 2, 1]},
            (40, 8, 10),
            (0, 0, 0),
        ),
        (
            {"resolution": [0.005, 0.004, 0.04], "units": ["um"] * 3}
            | {"offset": [0.12, 0.08, 0.4]},
            (40, 4, 5),
            (400, 80, 120),
        ),
    ],
)
def test_n5_attributes(
    tmp_path: pathlib.Path, attributes: dict, size: tuple, offset: tuple
) -> None:
    make_n5(tmp_path / "v")
    path = tmp_path / "v" / "attributes.json"
    stored = json.loads(path.read_text())
    for name in ("resolution", "units", "offset"):
        del stored[name]
    path.write_text(json.dumps(stored | attributes))
    volume = volumes.open(str(tmp_path / "v"))
    np.testing.assert_allclose(volume.voxel_size_nm_zyx, size)
    np.testing.assert_allclose(volume.offset_nm_zyx, offset)


@pytest.mark.parametrize(
    "attributes",
    [
        {"resolution": [4, 4]},
        {"resolution": [4, 4, 40], "units": ["parsec"] * 3},
        {"pixelResolution": {"unit": "nm"}},
    ],
)
def test_attributes_that_make_no_sense(
    tmp_path: pathlib.Path, attributes: dict
) -> None:
    make_n5(tmp_path / "v")
    path = tmp_path / "v" / "attributes.json"
    stored = json.loads(path.read_text())
    for name in ("resolution", "units", "offset"):
        del stored[name]
    path.write_text(json.dumps(stored | attributes))
    with pytest.raises(UserError, match="cannot (understand|open)"):
        volumes.open(str(tmp_path / "v"))


def test_synapse_sits_at_half_the_crop(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    index = np.array([[10, 15, 20]])
    position = index * VOXEL_SIZE_NM_ZYX + volume.offset_nm_zyx
    starts = volumes.crop_starts_vx_zyx(position, (4, 8, 6), volume)
    [(crop, whole)] = volumes.read_crops(volume, starts, (4, 8, 6))
    assert whole
    assert crop[2, 4, 3] == ARRAY_ZYX[10, 15, 20]


def test_crop_start_rounds_half_to_even(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    half = np.array([[0.5, 0, 0], [1.5, 0, 0], [2.5, 0, 0]])
    position = half * VOXEL_SIZE_NM_ZYX + volume.offset_nm_zyx
    starts = volumes.crop_starts_vx_zyx(position, (4, 4, 4), volume)
    assert starts[:, 0].tolist() == [-2, 0, 0]


def test_crops_over_the_border_are_zero_outside(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    shape = (6, 10, 10)
    starts = np.array([[-3, 25, 35], [0, 0, 0], [20, 0, 0], [14, 20, 30], [-6, 0, 0]])
    status = volumes.border_status(starts, shape, volume)
    expected = ["partly_outside", "ok", "outside", "ok", "outside"]
    assert status.tolist() == expected
    padded = np.pad(ARRAY_ZYX, 10)
    for start, (crop, whole) in zip(
        starts, volumes.read_crops(volume, starts, shape), strict=True
    ):
        z, y, x = start + 10
        np.testing.assert_array_equal(
            crop, padded[z : z + 6, y : y + 10, x : x + 10], strict=True
        )
        assert whole


def test_missing_chunk_is_flagged_and_its_neighbours_are_read(
    path: pathlib.Path,
) -> None:
    [chunk] = [
        p
        for p in path.rglob("*")
        if p.is_file()
        and p.relative_to(path).as_posix()
        in ("1/0/1", "1.0.1", "c/1/0/1", "5_4_40/40-56_20-36_18-26")
    ]
    driver = volumes.open(str(path)).store.spec().to_json()["driver"]
    chunk.unlink()
    volume = volumes.open(str(path))
    # All remove the chunk z 8..16, y 0..16, x 16..32, whatever its name.
    starts = np.array([[6, 10, 10], [0, 0, 0]])
    (crop, whole), (other, other_whole) = volumes.read_crops(
        volume, starts, (8, 12, 12)
    )
    assert not whole and other_whole
    expected = ARRAY_ZYX[6:14, 10:22, 10:22].copy()
    expected[2:8, 0:6, 6:12] = 0
    np.testing.assert_array_equal(crop, expected, err_msg=driver)
    np.testing.assert_array_equal(other, ARRAY_ZYX[:8, :12, :12])


def test_chunk_order_visits_each_chunk_once(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, np.array(SHAPE_ZYX) - 4, (200, 3))
    order = volumes.chunk_order(starts, (4, 4, 4), volume)
    assert sorted(order) == list(range(200))
    cells = [tuple(c) for c in (starts[order] + 2) // CHUNK_ZYX]
    changes = 1 + sum(a != b for a, b in zip(cells, cells[1:], strict=False))
    assert changes == len(set(cells))


def test_bounded_read_ahead_gives_the_same_crops(path: pathlib.Path) -> None:
    volume = volumes.open(str(path))
    starts = np.random.default_rng(0).integers(-4, 30, (40, 3))
    few = list(volumes.read_crops(volume, starts, (4, 4, 4), bytes_in_flight=100))
    many = list(volumes.read_crops(volume, starts, (4, 4, 4)))
    for (a, _), (b, _) in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b)


def test_voxel_size_mismatch_names_both(path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="40×4×5 nm .* 40×4×4 nm are expected"):
        volumes.open(str(path), (40, 4, 4))


def test_voxel_size_must_come_from_somewhere(tmp_path: pathlib.Path) -> None:
    make_zarr(tmp_path / "v", "zarr")
    (tmp_path / "v" / ".zattrs").unlink()
    with pytest.raises(UserError, match="does not state its voxel size"):
        volumes.open(str(tmp_path / "v"))
    volume = volumes.open(str(tmp_path / "v"), (8, 8, 8))
    assert volume.voxel_size_nm_zyx == (8, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no volume at"),
        (lambda p: (p / "attributes.json").write_text('{"n5": "2.0"}'), "container"),
        (lambda p: (p / "attributes.json").write_text("{"), "not valid JSON"),
    ],
)
def test_not_a_volume(tmp_path: pathlib.Path, make: object, message: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        volumes.open(str(tmp_path))


def test_other_dtype_is_refused(tmp_path: pathlib.Path) -> None:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/"},
        "metadata": {"shape": [4, 4, 4], "dtype": "<u2", "chunks": [4, 4, 4]},
    }
    ts.open(spec, create=True).result()
    with pytest.raises(UserError, match="holds uint16; only uint8"):
        volumes.open(str(tmp_path), (1, 1, 1))


def test_real_volumes() -> None:
    folder = shared_data("larval_vnc_sstem") / "stack1.n5" / "volumes" / "raw" / "s0"
    volume = volumes.open(str(folder))
    assert volume.shape_zyx == (20, 1024, 1024)
    np.testing.assert_allclose(volume.voxel_size_nm_zyx, (50, 4.6, 4.6))
    folder = shared_data("medulla_fibsem") / "sample1.n5" / "volumes" / "raw" / "s0"
    volume = volumes.open(str(folder))
    assert volume.shape_zyx == (250, 250, 250)
    assert volume.voxel_size_nm_zyx == (10, 10, 10)
    # Real tissue, not fill: another axis order would still be grey, so see test above.
    assert 60 < volume.read((100, 100, 100), (120, 120, 120)).mean() < 200
