# SPDX-License-Identifier: Apache-2.0
import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.training import shards
from tests.helpers.small_data import CLASSES, VOXEL_SIZE_NM_ZYX


def test_record_round_trip() -> None:
    crop = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    record = shards.encode(-(2**62), crop)
    synapse_id, decoded = shards.decode(record, (2, 3, 4))
    assert synapse_id == -(2**62)
    np.testing.assert_array_equal(decoded, crop)
    with pytest.raises(UserError, match="31 bytes.*needs 32"):
        shards.decode(record[:-1], (2, 3, 4))


def damage_missing(folder: pathlib.Path) -> None:
    next(folder.glob("*.array_record")).unlink()


def damage_cut_short(folder: pathlib.Path) -> None:
    path = next(folder.glob("*.array_record"))
    path.write_bytes(path.read_bytes()[:-1000])


def damage_index(folder: pathlib.Path) -> None:
    index = pa.feather.read_table(folder / "index.feather")
    files.write_feather(folder / "index.feather", index.slice(1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "is missing, but the manifest says"),
        (damage_cut_short, "bytes long, but the manifest says"),
        (damage_index, "index.feather has 80 rows, but the manifest says 81"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    ],
)
def test_damage_is_found_on_opening(
    own_shards: pathlib.Path, damage: Callable[[pathlib.Path], None], message: str
) -> None:
    damage(own_shards)
    with pytest.raises(UserError, match=message):
        shards.open(own_shards)


def test_verify_finds_a_changed_byte(own_shards: pathlib.Path) -> None:
    shards.verify(shards.open(own_shards))
    path = sorted(own_shards.glob("*.array_record"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="00001-of-.* checksum"):
        shards.verify(shards.open(own_shards))


def test_verify_finds_an_index_in_another_order(own_shards: pathlib.Path) -> None:
    index = pa.feather.read_table(own_shards / "index.feather")
    ids = index["synapse_id"].take([1, 0, *range(2, len(index))])
    place = index.column_names.index("synapse_id")
    swapped = index.set_column(place, "synapse_id", ids)
    files.write_feather(own_shards / "index.feather", swapped)
    with pytest.raises(UserError, match="row 0 of index.feather says synapse"):
        shards.verify(shards.open(own_shards))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_shape_zyx": (4, 16, 32)}, r"crop_shape_zyx \[4, 16, 16\] ≠"),
        ({"margin_vx_zyx": (1, 3, 2)}, "margin_vx_zyx"),
        ({"voxel_size_nm_zyx": (8, 8, 8)}, "voxel_size_nm_zyx"),
        ({"classes": CLASSES[::-1]}, "classes"),
    ],
)
def test_shards_of_another_config(
    shards_folder: pathlib.Path, change: dict[str, tuple], message: str
) -> None:
    fitting = {"crop_shape_zyx": (4, 16, 16), "margin_vx_zyx": (0, 2, 2)}
    fitting |= {"voxel_size_nm_zyx": VOXEL_SIZE_NM_ZYX, "classes": CLASSES}
    written = shards.open(shards_folder)
    shards.require(written, **fitting)
    with pytest.raises(UserError, match=message):
        shards.require(written, **(fitting | change))
