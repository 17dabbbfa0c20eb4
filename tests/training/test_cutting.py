# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.em import volumes
from synister_jax.tables import synapses
from synister_jax.training import shards
from tests.helpers.small_data import CLASSES, ROOT, write_shards

Cut = Callable[..., shards.Shards]


@pytest.fixture
def cut(volume_path: pathlib.Path, synapse_table: pa.Table) -> Cut:
    """A function that cuts shards into a folder, with the data of `shards_folder`."""

    def cut(
        folder: pathlib.Path,
        table: pa.Table = synapse_table,
        volume: pathlib.Path = volume_path,
    ) -> shards.Shards:
        return write_shards(folder, volume, table)

    return cut


@pytest.fixture
def cutting_program(
    tmp_path: pathlib.Path, volume_path: pathlib.Path, synapse_table: pa.Table
) -> Callable[..., list[str]]:
    """A function that returns a command: it runs `prelude`, and then cuts as `cut`."""
    table_path = tmp_path / "table.feather"
    files.write_feather(table_path, synapse_table)

    def program(prelude: str, folder: pathlib.Path, *arguments: str) -> list[str]:
        text = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.helpers.small_data import write_shards
from synister_jax.tables import reading
from synister_jax.training import shards
{prelude}
table = reading.load({str(table_path)!r})
write_shards(pathlib.Path({str(folder)!r}), {str(volume_path)!r}, table)
"""
        return [sys.executable, "-c", text, *arguments]

    return program


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


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


def test_manifest_says_what_is_there(shards_folder: pathlib.Path) -> None:
    manifest = json.loads((shards_folder / "manifest.json").read_text())
    assert manifest["records"] == 81 and manifest["dropped"] == {"no_class": 9}
    for entry in manifest["shards"]:
        path = shards_folder / entry["name"]
        assert path.stat().st_size == entry["bytes"]
        assert files.sha256(path) == entry["sha256"]


def test_rows_left_out_are_listed(
    tmp_path: pathlib.Path, cut: Cut, volume_path: pathlib.Path, synapse_table: pa.Table
) -> None:
    far = synapse_table.to_pylist()
    far[0]["x_nm"] = 1e6  # the whole crop is outside the volume
    far[1]["x_nm"] = 0.0  # a part of the crop is outside
    table = pa.Table.from_pylist(far, schema=synapse_table.schema)
    path = shutil.copytree(volume_path, tmp_path / "raw.n5")
    z, y, x = np.array([far[40][n] for n in synapses.POSITION], int) // (40, 4, 4)
    (path / f"{x // 32}" / f"{y // 32}" / f"{z // 8}").unlink()
    written = cut(tmp_path / "shards", table, path)
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


@pytest.mark.long
def test_killed_anywhere_and_rerun_gives_the_same_bytes(
    tmp_path: pathlib.Path,
    shards_folder: pathlib.Path,
    cut: Cut,
    cutting_program: Callable[..., list[str]],
) -> None:
    """The writer is killed (kill -9) after its 1st, 2nd, … rename or removal."""
    prelude = """
left = int(sys.argv[1])
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
"""
    expected = contents(shards_folder)
    died = 0
    for moment in (1, 2, 3, 5, 9, 14, 18, 20):
        folder = tmp_path / f"killed-{moment}"
        command = cutting_program(prelude, folder, str(moment))
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode in (0, -signal.SIGKILL), finished.stderr
        died += finished.returncode != 0
        cut(folder)
        assert contents(folder) == expected, f"killed at {moment}"
    assert died >= 8


@pytest.mark.long
def test_killed_in_the_middle_of_a_shard(
    tmp_path: pathlib.Path,
    shards_folder: pathlib.Path,
    cut: Cut,
    cutting_program: Callable[..., list[str]],
) -> None:
    """The writer is killed while it writes records."""
    prelude = """
encode = shards.encode
def slowly(*args):
    time.sleep(0.02)
    return encode(*args)
shards.encode = slowly
"""
    folder = tmp_path / "out"
    process = subprocess.Popen(cutting_program(prelude, folder))
    while len(list(folder.glob("crops-*.array_record"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "manifest.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        shards.open(folder)
    cut(folder)
    assert contents(folder) == contents(shards_folder)


def test_the_same_arguments_again_change_nothing(
    own_shards: pathlib.Path, cut: Cut
) -> None:
    before = {p: p.stat().st_mtime_ns for p in own_shards.iterdir()}
    cut(own_shards)
    assert {p: p.stat().st_mtime_ns for p in own_shards.iterdir()} == before


def test_other_arguments_are_refused(
    tmp_path: pathlib.Path, own_shards: pathlib.Path, cut: Cut, synapse_table: pa.Table
) -> None:
    with pytest.raises(UserError, match="synapses_sha256 was .* choose another"):
        cut(own_shards, synapse_table.slice(1))
    unlabelled = synapse_table.drop_columns("neurotransmitter").append_column(
        "neurotransmitter", pa.nulls(len(synapse_table), pa.string())
    )
    with pytest.raises(UserError, match="no row can be cut: of 90 synapses 0 have"):
        cut(tmp_path / "none", unlabelled)


def test_the_repair_that_opening_advises(
    own_shards: pathlib.Path, shards_folder: pathlib.Path, cut: Cut
) -> None:
    path = next(own_shards.glob("*.array_record"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"delete manifest.json and run"):
        shards.open(own_shards)
    (own_shards / "manifest.json").unlink()
    cut(own_shards)
    assert contents(own_shards) == contents(shards_folder)


def test_a_new_split_rewrites_the_index_alone(
    own_shards: pathlib.Path, cut: Cut, synapse_table: pa.Table
) -> None:
    before = {p: p.stat().st_mtime_ns for p in own_shards.iterdir()}
    part = pa.array(["test", "train", "validation"] * 30)
    table = synapse_table.append_column("split_hemilineage", part)
    written = cut(own_shards, table)
    changed = [p.name for p, t in before.items() if p.stat().st_mtime_ns != t]
    assert changed == ["index.feather"]
    wanted = dict(zip(table["synapse_id"].to_pylist(), part.to_pylist(), strict=True))
    found = written.index.select(["synapse_id", "split_hemilineage"]).to_pylist()
    assert len(found) == 81
    assert all(wanted[row["synapse_id"]] == row["split_hemilineage"] for row in found)
    shards.verify(written)


def test_nothing_readable_is_an_error(
    tmp_path: pathlib.Path, cut: Cut, volume_path: pathlib.Path
) -> None:
    empty = tmp_path / "raw.n5"
    empty.mkdir()
    shutil.copy(volume_path / "attributes.json", empty)
    with pytest.raises(UserError, match="none of 81 crops could be read"):
        cut(tmp_path / "shards", volume=empty)
    # When the volume is back, the same command cuts all crops.
    shutil.copytree(volume_path, empty, dirs_exist_ok=True)
    written = cut(tmp_path / "shards", volume=empty)
    assert written.manifest["dropped"] == {"no_class": 9}
    shards.verify(written)
