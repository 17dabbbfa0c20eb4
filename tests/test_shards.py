# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from conftest import CLASSES, VOXEL_SIZE_NM_ZYX, write_shards

from synister_jax import files, shards, synapses, volumes
from synister_jax.command import UserError


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_record_round_trip() -> None:
    crop = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    record = shards.encode(-(2**62), crop)
    synapse_id, decoded = shards.decode(record, (2, 3, 4))
    assert synapse_id == -(2**62)
    np.testing.assert_array_equal(decoded, crop)
    with pytest.raises(UserError, match="31 bytes.*needs 32"):
        shards.decode(record[:-1], (2, 3, 4))


def test_records_are_the_crops_of_their_rows(
    shards_folder: pathlib.Path, volume_path: pathlib.Path, synapse_table: pa.Table
) -> None:
    written = shards.open(shards_folder)
    assert len(written.manifest["shards"]) > 2
    volume = volumes.open(str(volume_path))
    array = np.pad(volume.read((0, 0, 0), volume.shape_zyx), 32)
    source = written.source()
    known = synapse_table.filter(pa.array(synapses.labels(synapse_table, CLASSES) >= 0))
    expected = {row["synapse_id"]: row for row in known.to_pylist()}
    assert len(source) == len(written.index) == len(expected)
    for row, record in zip(written.index.to_pylist(), source, strict=True):
        synapse_id, crop = written.decode(record)
        assert synapse_id == row["synapse_id"]
        wanted = expected.pop(synapse_id)
        assert {key: row[key] for key in wanted} == wanted
        centre = [wanted["z_nm"] / 40, wanted["y_nm"] / 4, wanted["x_nm"] / 4]
        z, y, x = np.array(centre, int) + 32
        np.testing.assert_array_equal(
            crop, array[z - 3 : z + 3, y - 10 : y + 10, x - 10 : x + 10]
        )


def test_rows_left_out_are_listed(
    tmp_path: pathlib.Path, volume_path: pathlib.Path, synapse_table: pa.Table
) -> None:
    far = synapse_table.to_pylist()
    far[0]["x_nm"] = 1e6  # outside
    far[1]["x_nm"] = 0.0  # partly
    table = pa.Table.from_pylist(far, schema=synapse_table.schema)
    path = tmp_path / "raw.n5"
    shutil.copytree(volume_path, path)
    z, y, x = np.array([far[40][n] for n in synapses.POSITION], int) // (40, 4, 4)
    (path / f"{x // 32}" / f"{y // 32}" / f"{z // 8}").unlink()
    written = write_shards(tmp_path / "shards", path, table)
    dropped = pa.feather.read_table(tmp_path / "shards" / "dropped.feather")
    reasons = dict(zip(*dropped.to_pydict().values(), strict=True))
    ids = table["synapse_id"].to_pylist()
    assert reasons[ids[0]] == "outside"
    assert reasons[ids[9]] == "no_class"
    assert reasons[ids[40]] == "missing_data"
    kept = written.index["synapse_id"].to_pylist()
    assert sorted([*kept, *reasons]) == sorted(ids)
    status = dict(zip(kept, written.index["status"].to_pylist(), strict=True))
    assert status[ids[1]] == "partly_outside" and status[ids[2]] == "ok"
    assert sum(written.manifest["dropped"].values()) == len(dropped)
    shards.verify(written)


def test_killed_anywhere_and_rerun_gives_the_same_bytes(
    tmp_path: pathlib.Path,
    shards_folder: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    """kill -9 after 1, 2, … renames or removals of the writer."""
    files.write_feather(tmp_path / "table.feather", synapse_table)
    program = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
left = int(sys.argv[2])
def die_after(function):
    def wrapped(*args, **kwargs):
        global left
        result = function(*args, **kwargs)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped
os.replace = die_after(os.replace)
pathlib.Path.rename = die_after(pathlib.Path.rename)
pathlib.Path.unlink = die_after(pathlib.Path.unlink)
from conftest import write_shards
from synister_jax import synapses
table = synapses.load({str(tmp_path / "table.feather")!r})
write_shards(pathlib.Path(sys.argv[1]), {str(volume_path)!r}, table)
"""
    expected = contents(shards_folder)
    died = 0
    for moment in (1, 2, 3, 4, 5, 7, 9, 12, 14, 16, 18, 20):
        folder = tmp_path / f"killed-{moment}"
        command = [sys.executable, "-c", program, str(folder), str(moment)]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode in (0, -signal.SIGKILL), finished.stderr
        died += finished.returncode != 0
        write_shards(folder, volume_path, synapse_table)
        assert contents(folder) == expected, f"killed at {moment}"
    assert died >= 8


def test_killed_in_the_middle_of_a_shard(
    tmp_path: pathlib.Path,
    shards_folder: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    """The command itself, killed by the clock while it writes records."""
    files.write_feather(tmp_path / "table.feather", synapse_table)
    slow = f"""
import sys, time
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from conftest import write_shards
from synister_jax import shards, synapses
encode = shards.encode
def slowly(*args):
    time.sleep(0.02)
    return encode(*args)
shards.encode = slowly
table = synapses.load({str(tmp_path / "table.feather")!r})
write_shards({str(tmp_path / "out")!r}, {str(volume_path)!r}, table)
"""
    process = subprocess.Popen([sys.executable, "-c", slow])
    folder = tmp_path / "out"
    while len(list(folder.glob("crops-*.array_record"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "manifest.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        shards.open(folder)
    write_shards(folder, volume_path, synapse_table)
    assert contents(folder) == contents(shards_folder)


def test_other_arguments_are_refused(
    tmp_path: pathlib.Path,
    shards_folder: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    folder = shutil.copytree(shards_folder, tmp_path / "shards")
    write_shards(folder, volume_path, synapse_table)  # the same: nothing to do
    with pytest.raises(UserError, match="synapses_sha256 was .* choose another"):
        write_shards(folder, volume_path, synapse_table.slice(1))
    unlabelled = synapse_table.drop_columns("neurotransmitter").append_column(
        "neurotransmitter", pa.nulls(len(synapse_table), pa.string())
    )
    with pytest.raises(UserError, match="no row can be cut: of 90 synapses 0 have"):
        write_shards(tmp_path / "none", volume_path, unlabelled)


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
        (damage_missing, "is missing, the manifest says"),
        (damage_cut_short, "bytes long, the manifest says"),
        (damage_index, "index.feather has 80 rows, the manifest says 81"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    ],
)
def test_damage_is_found_on_opening(
    tmp_path: pathlib.Path, shards_folder: pathlib.Path, damage: object, message: str
) -> None:
    folder = shutil.copytree(shards_folder, tmp_path / "shards")
    damage(folder)
    with pytest.raises(UserError, match=message):
        shards.open(folder)


def test_the_repair_that_opening_advises(
    tmp_path: pathlib.Path,
    shards_folder: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    folder = shutil.copytree(shards_folder, tmp_path / "shards")
    damage_cut_short(folder)
    (folder / "manifest.json").unlink()
    write_shards(folder, volume_path, synapse_table)
    assert contents(folder) == contents(shards_folder)


def test_a_new_split_rewrites_the_index_alone(
    tmp_path: pathlib.Path,
    shards_folder: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    folder = shutil.copytree(shards_folder, tmp_path / "shards")
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    part = pa.array(["test", "train", "validation"] * 30)
    table = synapse_table.append_column("split_hemilineage", part)
    written = write_shards(folder, volume_path, table)
    changed = [p.name for p, t in before.items() if p.stat().st_mtime_ns != t]
    assert changed == ["index.feather"]
    wanted = dict(zip(table["synapse_id"].to_pylist(), part.to_pylist(), strict=True))
    found = written.index.select(["synapse_id", "split_hemilineage"]).to_pylist()
    assert len(found) == 81
    assert all(wanted[row["synapse_id"]] == row["split_hemilineage"] for row in found)
    shards.verify(written)


def test_nothing_readable_is_an_error(
    tmp_path: pathlib.Path, volume_path: pathlib.Path, synapse_table: pa.Table
) -> None:
    (tmp_path / "raw.n5").mkdir()
    shutil.copy(volume_path / "attributes.json", tmp_path / "raw.n5")
    with pytest.raises(UserError, match="none of 81 crops could be read"):
        write_shards(tmp_path / "shards", tmp_path / "raw.n5", synapse_table)
    # The volume comes back: the same command cuts all of it.
    shutil.copytree(volume_path, tmp_path / "raw.n5", dirs_exist_ok=True)
    written = write_shards(tmp_path / "shards", tmp_path / "raw.n5", synapse_table)
    assert written.manifest["dropped"] == {"no_class": 9}
    shards.verify(written)


def test_verify_finds_what_opening_cannot(
    tmp_path: pathlib.Path, shards_folder: pathlib.Path
) -> None:
    shards.verify(shards.open(shards_folder))
    folder = shutil.copytree(shards_folder, tmp_path / "shards")
    path = sorted(folder.glob("*.array_record"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="00001-of-.* checksum"):
        shards.verify(shards.open(folder))

    folder = shutil.copytree(shards_folder, tmp_path / "swapped")
    index = pa.feather.read_table(folder / "index.feather")
    order = [1, 0, *range(2, len(index))]
    ids = index["synapse_id"].take(order)
    place = index.column_names.index("synapse_id")
    swapped = index.set_column(place, "synapse_id", ids)
    files.write_feather(folder / "index.feather", swapped)
    with pytest.raises(UserError, match="row 0 of index.feather says synapse"):
        shards.verify(shards.open(folder))


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


def test_manifest_says_what_is_there(shards_folder: pathlib.Path) -> None:
    manifest = json.loads((shards_folder / "manifest.json").read_text())
    assert manifest["records"] == 81 and manifest["dropped"] == {"no_class": 9}
    for entry in manifest["shards"]:
        path = shards_folder / entry["name"]
        assert path.stat().st_size == entry["bytes"]
        assert files.sha256(path) == entry["sha256"]
