# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import numpy as np
import pytest
import tensorstore as ts

from synister_jax.base.errors import UserError
from synister_jax.em import volumes
from tests.helpers.small_data import shared_data
from tests.helpers.volume_formats import (
    ARRAY_ZYX,
    CHUNK_ZYX,
    JPEG_MAKERS,
    MAKERS,
    SHAPE_ZYX,
    SMOOTH_ZYX,
    VOXEL_SIZE_NM_ZYX,
    make_n5,
    make_zarr,
)


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


@pytest.mark.parametrize("kind", JPEG_MAKERS)
def test_jpeg_is_zyx_too(tmp_path: pathlib.Path, kind: str) -> None:
    JPEG_MAKERS[kind](tmp_path / "v", SMOOTH_ZYX)
    volume = volumes.open(str(tmp_path / "v"))
    assert volume.chunk_shape_zyx == CHUNK_ZYX
    assert volume.voxel_size_nm_zyx == VOXEL_SIZE_NM_ZYX
    assert volume.offset_nm_zyx == (400, 80, 120)
    voxels = volume.read((0, 0, 0), SHAPE_ZYX)
    np.testing.assert_allclose(voxels.astype(int), SMOOTH_ZYX, atol=2)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("n5", "n5"),
        ("zarr", "zarr"),
        ("zarr", "zarr2"),
        ("zarr3", "zarr"),
        ("zarr3", "zarr3"),
        ("precomputed_sharded", "precomputed"),
    ],
)
def test_the_format_may_stand_before_the_uri(
    tmp_path: pathlib.Path, kind: str, prefix: str
) -> None:
    MAKERS[kind](tmp_path / "v")
    for uri in (tmp_path / "v", (tmp_path / "v").as_uri()):
        volume = volumes.open(f"{prefix}://{uri}")
        assert volume.uri == f"{prefix}://{uri}"
        np.testing.assert_array_equal(volume.read((0, 0, 0), SHAPE_ZYX), ARRAY_ZYX)


def test_the_format_before_the_uri_must_be_right(tmp_path: pathlib.Path) -> None:
    make_n5(tmp_path)
    with pytest.raises(
        UserError, match="not a precomputed volume.* says that it is n5"
    ):
        volumes.open(f"precomputed://{tmp_path}")
    with pytest.raises(UserError, match="not a zarr2 volume.* says that it is n5"):
        volumes.open(f"zarr2://{tmp_path}")
    # If the folder holds two formats, the prefix selects one.
    make_zarr(tmp_path)
    for prefix in ("n5", "zarr"):
        volume = volumes.open(f"{prefix}://{tmp_path}")
        assert volume.store.spec().to_json()["driver"] == prefix


@pytest.mark.parametrize("kind", ["n5", "zarr"])
def test_lz4_is_named(tmp_path: pathlib.Path, kind: str) -> None:
    """Java tools write N5 with lz4, which TensorStore cannot decode."""
    MAKERS[kind](tmp_path)
    if kind == "n5":
        path, change = tmp_path / "attributes.json", {"compression": {"type": "lz4"}}
    else:
        path, change = tmp_path / ".zarray", {"compressor": {"id": "lz4"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="compressed with lz4, .* copy .* gzip"):
        volumes.open(str(tmp_path))


def test_errors_do_not_quote_whole_specs(tmp_path: pathlib.Path) -> None:
    make_n5(tmp_path)
    path = tmp_path / "attributes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blockSize": [1]}))
    with pytest.raises(UserError, match="cannot open volume .*blockSize") as raised:
        volumes.open(str(tmp_path))
    assert "tensorstore_spec" not in str(raised.value)


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
    """Voxels, voxel size and offset follow the axis names that the container gives."""
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
    make_zarr(tmp_path / "0", driver=driver)
    make_zarr(tmp_path / "1", driver=driver)
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


def test_voxel_size_mismatch_names_both(path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="40×4×5 nm .* 40×4×4 nm are expected"):
        volumes.open(str(path), (40, 4, 4))


def test_voxel_size_must_come_from_somewhere(tmp_path: pathlib.Path) -> None:
    make_zarr(tmp_path / "v")
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
    # The mean is that of tissue, not of fill. Another axis order would give the same
    # mean, so the tests above check the order.
    assert 60 < volume.read((100, 100, 100), (120, 120, 120)).mean() < 200
