# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess

import pytest
from pyarrow import feather, parquet

from synister_jax import export
from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.exchange import export_files
from synister_jax.exchange.export_files import ExportOptions
from tests.helpers import commands, prediction_tables
from tests.helpers.prediction_tables import NEURON, SIX


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return commands.run("-m", "synister_jax.export", *arguments)


@pytest.mark.long
def test_command(tmp_path: pathlib.Path) -> None:
    table = prediction_tables.make([NEURON, None], ["gaba", None])
    path = prediction_tables.write(tmp_path, table)
    output = tmp_path / "out"
    done = run(f"--predictions={path}", "--to=fafbseg", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert (
        "note: the predictions have no cleft scores: every synapse gets the weight 1"
        in done.stdout
    )
    assert done.stdout.endswith(f"{output}: files for fafbseg of 2 synapses\n")
    assert len(feather.read_table(output / "synapses.feather")) == 2
    content = json.loads((output / "export.json").read_text())
    assert content["to"] == "fafbseg"
    assert (content["predictions"], content["synapses"]) == (path, 2)
    assert content["about"]["step"] == 1000
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
        export.export(path, "cave", output, ExportOptions())
    assert output.read_text() == "mine"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_else_is_in_the_folder_stays(tmp_path: pathlib.Path) -> None:
    path = prediction_tables.write(tmp_path, prediction_tables.make([1], ["gaba"]))
    (tmp_path / "mine.txt").write_text("mine")
    export.export(path, "cave", tmp_path, ExportOptions())
    before = contents(tmp_path)
    assert set(before) == {
        "mine.txt",
        "predictions.feather",
        "synapses_nt_v1.feather",
        "export.json",
    }
    with pytest.raises(UserError, match="other arguments: to was cave, now fafbseg"):
        export.export(path, "fafbseg", tmp_path, ExportOptions())
    assert contents(tmp_path) == before


def test_files_of_others_stay(tmp_path: pathlib.Path) -> None:
    path = prediction_tables.write(tmp_path, prediction_tables.make([1], ["gaba"]))
    for name in ("synapses.feather", "synapses.feather.partial", "query.tmp"):
        output = tmp_path / f"has {name}"
        output.mkdir()
        (output / name).write_text("mine")
        with pytest.raises(UserError, match=f"has {name} already, but no export.json"):
            export.export(path, "fafbseg", output, ExportOptions())
        assert contents(output) == {name: b"mine"}
    for text in ("[]", '{"to": "fafbseg"}'):
        output = tmp_path / f"has {len(text)}"
        output.mkdir()
        (output / "export.json").write_text(text)
        with pytest.raises(UserError, match="export.json exists and another command"):
            export.export(path, "fafbseg", output, ExportOptions())
        assert contents(output) == {"export.json": text.encode()}


def test_what_is_read_is_never_written(tmp_path: pathlib.Path) -> None:
    table = prediction_tables.make([1], ["gaba"])
    given = pathlib.Path(prediction_tables.write(tmp_path, table))
    path = given.rename(tmp_path / "synapses.feather")
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for output in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="synapses.feather is the input"):
            export.export(str(path), "fafbseg", output, ExportOptions())
    # The input may also be a link.
    link = tmp_path / "predictions.feather"
    link.symlink_to(path)
    with pytest.raises(UserError, match="synapses.feather is the input"):
        export.export(str(link), "fafbseg", tmp_path, ExportOptions())
    matrix = tmp_path / "neurotransmitter-confusion.csv"
    lines = [",".join(["", *SIX])]
    lines += [",".join([a, *(str(int(a == b)) for b in SIX)]) for a in SIX]
    matrix.write_text("\n".join(lines))
    options = ExportOptions((40, 4, 4), str(matrix))
    with pytest.raises(UserError, match="confusion.csv is the input"):
        export.export(str(path), "flyem", tmp_path, options)
    parts = tmp_path / "parts"
    parts.mkdir()
    parquet.write_table(table, parts / "part-0.parquet")
    with pytest.raises(UserError, match="parts is the input"):
        export.export(str(parts), "banc", parts, ExportOptions())
    assert path.read_bytes() == before["synapses.feather"]
    assert not (tmp_path / "export.json").exists()


@pytest.mark.parametrize("to", export.CONSUMERS)
def test_the_record_lists_the_files_and_a_rerun_gives_the_same_bytes(
    tmp_path: pathlib.Path, to: str
) -> None:
    x_nm = [float("nan"), 4.0]
    table = prediction_tables.make([NEURON] * 2, ["gaba"] * 2, x_nm=x_nm)
    path = prediction_tables.write(tmp_path, table)
    given = {"voxel_size_nm_zyx": (40.0, 4.0, 4.0), "predict": 3}
    given["confusion"] = prediction_tables.confusion(tmp_path)
    consumer = export.CONSUMERS[to]
    options = ExportOptions(**{k: v for k, v in given.items() if k in consumer.takes})
    output = tmp_path / "out"
    content = export.export(path, to, output, options)
    before = contents(output)
    assert set(before) == {"export.json", *consumer.files}
    assert content["files"] == list(consumer.files) and content["finished"]
    (output / f"{consumer.files[-1]}.partial").write_text("of a run that was killed")
    export.export(path, to, output, options)
    assert contents(output) == before


def test_a_killed_folder_is_of_its_predictions(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = prediction_tables.make([1, 2], ["gaba", "gaba"])
    path = prediction_tables.write(tmp_path, table)
    output = tmp_path / "out"
    options = ExportOptions((40, 4, 4), predict=3)

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(export_files, "write", kill)
        with pytest.raises(Killed):
            export.export(path, "synister", output, options)
    assert not files.read_json(output / "export.json")["finished"]
    assert len(contents(output)) == 1
    # No file was written yet, so that another export may use the folder.
    export.export(path, "cave", output, ExportOptions())
    output = tmp_path / "killed later"
    write = export_files.write
    with monkeypatch.context() as patch:
        patch.setattr(
            export_files,
            "write",
            lambda p, *of: kill() if p.suffix == ".feather" else write(p, *of),
        )
        with pytest.raises(Killed):
            export.export(path, "synister", output, options)
    assert set(contents(output)) == {"export.json", "predictions.csv"}
    with pytest.raises(UserError, match="to was synister, now cave"):
        export.export(path, "cave", output, ExportOptions())
    with pytest.raises(UserError, match="options was .*'predict': 3.*'predict': 4"):
        export.export(path, "synister", output, ExportOptions((40, 4, 4), predict=4))
    # If the predictions at this path change, the export writes all files again.
    prediction_tables.write(tmp_path, table.slice(1))
    content = export.export(path, "synister", output, options)
    assert content["synapses"] == 1 and content["finished"]
    assert len(feather.read_table(output / "synapses.feather")) == 1


def test_not_complete_until_all_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = prediction_tables.write(tmp_path, prediction_tables.make([1], ["gaba"]))
    output = tmp_path / "out"
    export.export(path, "banc", output, ExportOptions())
    before = (output / "banc_nt_prediction.parquet").read_bytes()

    def fail(*arguments: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(export_files, "write_table", fail)
    with pytest.raises(UserError, match="the disk is full"):
        export.export(path, "banc", output, ExportOptions())
    assert not files.read_json(output / "export.json")["finished"]
    assert (output / "banc_nt_prediction.parquet").read_bytes() == before
