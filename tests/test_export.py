# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess
import sys

import prediction_tables
import pytest
from prediction_tables import NEURON
from pyarrow import feather

from synister_jax import export, exports
from synister_jax.command import UserError
from synister_jax.export import Options


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "synister_jax.export", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command(tmp_path: pathlib.Path) -> None:
    table = prediction_tables.make([NEURON, None], ["gaba", None])
    path = prediction_tables.write(tmp_path, table)
    output = tmp_path / "out"
    done = run(f"--predictions={path}", "--to=fafbseg", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "note: there are no cleft scores: every synapse weighs 1" in done.stdout
    assert done.stdout.endswith(f"{output}: files for fafbseg of 2 synapses\n")
    assert len(feather.read_table(output / "synapses.feather")) == 2
    content = json.loads((output / "export.json").read_text())
    assert content["to"] == "fafbseg"
    assert content["predictions"]["path"] == path
    assert content["predictions"]["step"] == 1000
    assert len(content["notes"]) == 1


def test_unknown_consumer(tmp_path: pathlib.Path) -> None:
    done = run("--predictions=x", "--to=catmaid", f"--output={tmp_path}")
    assert done.returncode == 2
    assert "--to" in done.stderr and len(done.stderr.splitlines()) == 1


def test_output_that_is_a_file(tmp_path: pathlib.Path) -> None:
    path = prediction_tables.write(tmp_path, prediction_tables.make([1], ["gaba"]))
    output = tmp_path / "file"
    output.write_text("mine")
    with pytest.raises(UserError, match="cannot write to .*choose another folder"):
        export.export(path, "cave", output, Options())
    assert output.read_text() == "mine"


def test_what_else_is_in_the_folder_stays(tmp_path: pathlib.Path) -> None:
    path = prediction_tables.write(tmp_path, prediction_tables.make([1], ["gaba"]))
    (tmp_path / "mine.txt").write_text("mine")
    export.export(path, "cave", tmp_path, Options())
    export.export(path, "fafbseg", tmp_path, Options())
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "mine.txt",
        "predictions.feather",
        "synapses_nt_v1.feather",
        "synapses.feather",
        "export.json",
    }


def test_not_complete_until_all_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = prediction_tables.write(tmp_path, prediction_tables.make([1], ["gaba"]))
    output = tmp_path / "out"
    export.export(path, "banc", output, Options())
    before = (output / "banc_nt_prediction.parquet").read_bytes()

    def fail(*arguments: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(exports, "write_table", fail)
    with pytest.raises(UserError, match="the disk is full"):
        export.export(path, "banc", output, Options())
    assert not (output / "export.json").exists()
    assert (output / "banc_nt_prediction.parquet").read_bytes() == before


def test_all_consumers_are_known_to_all() -> None:
    assert list(export.TAKES) == list(exports.NAMES)
