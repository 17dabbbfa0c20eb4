# SPDX-License-Identifier: Apache-2.0
"""Tests the command `request`, as users type it."""

import pathlib
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv

from synister_jax.tables import predictions, synapses
from tests.helpers import commands, service_servers

pytestmark = pytest.mark.long

ANSWER = ("predictions.feather", "predictions.csv", "report.html", "answer.json")


@pytest.fixture
def command(
    trained_run: pathlib.Path, volume_path: pathlib.Path, tmp_path: pathlib.Path
) -> list[str]:
    return [
        *(sys.executable, "-m", "synister_jax.request", "--source=none"),
        *(f"--workdir={trained_run}", f"--volume={volume_path}"),
        *("--batch_size=8", f"--output={tmp_path / 'answer'}"),
    ]


def run(command: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return commands.run(*command, *more)


def test_neuron_ids_in_transmitters_out(
    command: list[str],
    table_path: pathlib.Path,
    synapse_table: pa.Table,
    tmp_path: pathlib.Path,
) -> None:
    first, second = synapse_table["neuron_id"].unique().to_pylist()[:2]
    done = run(command, f"--neurons={first},{second},5", f"--synapses={table_path}")
    assert done.returncode == 0, done.stderr
    table = predictions.load(tmp_path / "answer" / "predictions.feather")
    assert table["neuron_id"].unique().to_pylist() == [first, second]
    called = predictions.called(table)[: table["neuron_id"].to_pylist().count(first)]
    counts = [int((called == c).sum()) for c in range(3)]
    most = predictions.classes(table)[counts.index(max(counts))]
    assert f"{first}: {most}, {max(counts)} of {len(called)} synapses" in done.stdout
    assert "unknown neurons (1): 5" in done.stdout
    assert all((tmp_path / "answer" / name).exists() for name in ANSWER)


def test_catmaid_is_asked_and_one_section_lies_between(
    command: list[str], synapse_table: pa.Table, tmp_path: pathlib.Path
) -> None:
    """The positions from CATMAID are shifted by one section into the volume frame.

    Two skeletons share a connector. The third skeleton has no connector, and the fourth
    id is unknown.
    """
    rows = synapse_table.select(["synapse_id", *synapses.POSITION]).to_pylist()[:6]
    links = [
        (16 + i // 3, row["synapse_id"], row["x_nm"], row["y_nm"], row["z_nm"] + 40)
        for i, row in enumerate(rows)
    ]
    links.append((17, *links[0][1:]))
    server = service_servers.Catmaid(links, empty=[18], token="secret")
    environment = {"CATMAID_URL": server.url}
    asked = [*command, "--source=fafb-catmaid", "--neurons=18 17 16 19"]
    try:
        refused = commands.run(*asked, environment=environment)
        environment["CATMAID_TOKEN"] = "secret"
        done = commands.run(*asked, environment=environment)
    finally:
        server.close()
    assert refused.returncode == 1 and "CATMAID_TOKEN" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert "unknown neurons (1): 19" in done.stdout
    assert "neurons without synapses (1): 18" in done.stdout
    table = predictions.load(tmp_path / "answer" / "predictions.feather")
    expected = sorted(link for link in links if link[0] == 17)
    expected += sorted(link for link in links if link[0] == 16)
    found = table.select(["neuron_id", "synapse_id", "x_nm", "y_nm", "z_nm"])
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        (*link[:4], link[4] - 40) for link in expected
    ]
    assert set(table["status"].to_pylist()) == {"ok"}
    shared = predictions.probabilities(table)[
        table["synapse_id"].to_numpy() == links[0][1]
    ]
    assert len(shared) == 2
    np.testing.assert_array_equal(shared[0], shared[1])


def test_killed_and_typed_again(command: list[str], tmp_path: pathlib.Path) -> None:
    rows = ["id,skid,x,y,z"]
    rows += [
        f"{i},{i % 7},{40 + i % 500},{60 + i % 400},{100 + i % 700}"
        for i in range(3_000)
    ]
    path = tmp_path / "positions.csv"
    path.write_text("\n".join(rows) + "\n")
    folder = tmp_path / "answer"
    process = subprocess.Popen(
        [*command, f"--positions={path}"], stdout=subprocess.DEVNULL
    )
    while not list(folder.glob("parts/*.feather")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (folder / "answer.json").exists()
    assert run(command, f"--positions={path}").returncode == 0
    other = [*command[:-1], f"--output={tmp_path / 'other'}"]
    assert run(other, f"--positions={path}").returncode == 0
    for name in ANSWER:
        other_bytes = (tmp_path / "other" / name).read_bytes()
        assert (folder / name).read_bytes() == other_bytes, name
    written = csv.read_csv(folder / "predictions.csv")
    assert written["position_id"].to_pylist() == list(range(3_000))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give either --neurons or --positions"),
        (["--neurons=1", "--positions=x.csv"], "give either"),
        (["--positions=absent.csv"], "cannot read absent.csv"),
        (["--neurons=1"], "give it"),
        (["--positions={text}"], "line 3, column x: 'abc'"),
        (["--positions={good}", "--step=77"], "no checkpoint of step 77"),
        (["--positions={good}", "--volume=nowhere.n5"], "nowhere.n5"),
        (["--positions={good}", "--synapses={good}"], "leave it out"),
    ],
)
def test_what_is_wrong_is_said(
    command: list[str], tmp_path: pathlib.Path, more: list[str], said: str
) -> None:
    text, good = tmp_path / "text.csv", tmp_path / "good.csv"
    text.write_text("id,x,y,z\n1,2,3,4\n2,abc,3,4\n")
    good.write_text("id,x,y,z\n1,2,3,4\n")
    done = run(command, *(m.format(text=text, good=good) for m in more))
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
