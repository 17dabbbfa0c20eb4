# SPDX-License-Identifier: Apache-2.0
"""Tests tools/import_mongo.py as a user sees it: subcommands, mistakes, kill -9."""

import pathlib
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.tables import predictions, reading, synapses
from synister_jax.tables.mongo import address, databases
from tests.helpers import commands
from tests.helpers.small_data import ROOT

CLASSES = ("gaba", "acetylcholine", "dopamine")
TEST_SET = ("--split=skeleton", "--experiment=fafb", "--train=3", "--predict=1000")
BRAIN = ("--layout=brain", "--collection=partners", "--predict=8")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "tools/import_mongo.py", *map(str, arguments)]


def run(*arguments: str) -> str:
    """Runs the command, which must succeed, and returns what the command prints."""
    done = commands.run(*command(*arguments), check=True)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "load, dump, load_predictions, dump_predictions"),
        (["lod", "--mongo=mongodb://h/d"], 2, "dump_predictions (not 'lod')"),
        (["--mongo=mongodb://h/d", "load"], 2, "first say what to do: load, dump,"),
        (["load", "--mongo=mongodb://h/d"], 2, "synapses"),
        (["load", "--mongo=mongodb://h/d", "--synapses=no"], 1, "no does not exist"),
        (["dump", "--mongo=x", "--output=o", "--synapses=s"], 2, "synapses"),
        (["dump", "--mongo=x", "--output=o.feather"], 1, "give --credentials"),
        (["dump", "more", "--mongo=x", "--output=o"], 2, "unexpected argument 'more'"),
        (
            ["dump", "--mongo=mongodb://u:pass@word@h/d", "--output=o.feather"],
            1,
            "a MongoDB URI is",
        ),
        (["mongodb://me:pass@h/a", "dump"], 2, "mongodb://…@h/a"),
        (
            ["dump", "mongodb://me:pass@h/a", "--mongo=x", "--output=o"],
            2,
            "mongodb://…@h/a",
        ),
        (
            ["load", "--mongo=mongodb://h/d", "--synapses=MongoDB://me:pass@h/d"],
            1,
            "does not exist",
        ),
        (
            ["dump", "--mongo=mongodb://h/d?tlsCAFile=/pass", "--output=o.feather"],
            1,
            "mongodb://h/d with its options is not usable",
        ),
        (
            ["load", "--mongo=mongodb://h/d", "--synapses=mongodb://g/d"]
            + ["--overwrite"],
            1,
            "both name database d; dump this database to a file",
        ),
        (
            ["load_predictions", "--mongo=mongodb://h/d", "--predictions=p"],
            2,
            "--layout=testset needs --split",
        ),
        (
            ["dump_predictions", "--mongo=x", "--output=o", *BRAIN, "--train=3"],
            2,
            "--layout=brain does not take --train",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], code: int, message: str) -> None:
    done = commands.run(*command(*arguments))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr and "pass@" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_there_and_back(
    tmp_path: pathlib.Path, mongo_database: str, synapse_table: pa.Table
) -> None:
    # The layout has one label for each neuron, so that all its synapses must have it.
    known = pa.compute.is_valid(synapse_table["neurotransmitter"])
    table = synapse_table.filter(known)
    place = table.column_names.index("x_nm")
    table = table.set_column(place, "x_nm", pa.compute.add(table["x_nm"], 0.5))
    source, output = tmp_path / "s.feather", tmp_path / "back.feather"
    feather.write_feather(table, str(source))
    location = f"--mongo={mongo_database}"
    shown = address.redact(mongo_database)

    printed = run("load", location, f"--synapses={source}")
    assert f"note: {len(table)} positions are not whole nm" in printed
    assert f"{shown}: 6 hemi_lineages, 18 skeletons, {len(table)} synapses" in printed
    again = run("load", location, f"--synapses={source}")
    assert again.endswith(f"{len(table)} synapses, stored already\n")
    assert f"{output}: {len(table)} synapses of {shown}" in run(
        "dump", location, f"--output={output}"
    )
    assert reading.load(output).equals(reading.load(source))

    values = np.random.default_rng(0).random((len(table), 3), dtype=np.float32)
    values[4] = np.nan
    given = predictions.build(table, values, ["ok"] * len(table), CLASSES, {"step": 3})
    feather.write_feather(given, str(tmp_path / "p.feather"))
    for layout in (TEST_SET, BRAIN):
        load = ("load_predictions", location, *layout)
        load += (f"--predictions={tmp_path / 'p.feather'}",)
        assert run(*load).endswith("p.feather is stored\n")
        assert run(*load).endswith("p.feather is stored already\n")
        run("dump_predictions", location, *layout, f"--output={output}")
        found = predictions.load(output)
        assert predictions.about(found)["step"] == 3
        values = predictions.probabilities(found), predictions.probabilities(given)
        np.testing.assert_array_equal(*values)
        for name in ("synapse_id", *synapses.POSITION, "status"):
            assert found[name].equals(given[name])
        assert found["neuron_id"].equals(given["neuron_id"]) == (layout is TEST_SET)
        if layout is TEST_SET:
            by_neuron = f"--predictions={output}", f"--output={tmp_path / 'n.feather'}"
            done = commands.run("-m", "synister_jax.aggregate", *by_neuron)
            assert "18 groups from" in done.stdout, done.stderr


def big_table(path: pathlib.Path) -> int:
    count = 9_000
    rng = np.random.default_rng(0)
    neuron = np.arange(count) // 70
    columns = {"synapse_id": 2**60 + rng.permutation(count)}
    columns |= {name: rng.random(count) * 1e6 for name in synapses.POSITION}
    columns |= {"neuron_id": neuron}
    columns |= {"neurotransmitter": np.array(["gaba", "dopamine"])[neuron % 2]}
    columns |= {"split_skeleton": np.array(["train", "test"])[neuron % 2]}
    feather.write_feather(pa.table(columns), str(path))
    return count


def contents(uri: str) -> dict[str, list]:
    with databases.connect(uri) as database:
        names = database.list_collection_names()
        return {name: list(database[name].find()) for name in sorted(names)}


def kill_when(uri: str, arguments: list[str], wanted: str | int) -> bool:
    """Kills an import (-9) when it has stored this many synapses or is in this state.

    Returns False if the import ended before the kill.
    """
    with databases.connect(uri) as database:
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        while process.poll() is None:
            if isinstance(wanted, int):
                there = database.synapses.count_documents({}) >= wanted
            else:
                state = databases.recorded(database, databases.GROUND_TRUTH).get(
                    "state"
                )
                there = state == wanted
            if there:
                process.kill()
            time.sleep(0.002)
        return process.wait() != 0


@pytest.mark.long
def test_killed_and_run_again(
    tmp_path: pathlib.Path, mongo_database: str, mongo_server_uri: str
) -> None:
    source = tmp_path / "s.feather"
    count = big_table(source)
    arguments = ["load", f"--mongo={mongo_database}", f"--synapses={source}"]
    run(*arguments)
    undisturbed = contents(mongo_database)
    assert len(undisturbed["synapses"]) == count
    killed = []
    with databases.connect(mongo_database) as database:
        database.client.drop_database(database.name)
    # Each import continues where the import before it was killed.
    for wanted in (databases.FILLING, 1, 4_000, 5_001, 9_000):
        killed.append(kill_when(mongo_database, arguments, wanted))
    run(*arguments)
    assert contents(mongo_database) == undisturbed
    assert sum(killed) >= 3, killed
