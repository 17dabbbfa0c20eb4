# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from synister_jax import aggregate
from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.evaluation import group_calls, vote_tallies, voting_rules
from synister_jax.tables import predictions
from tests.helpers import commands
from tests.helpers.prediction_tables import drawn, table_of
from tests.helpers.small_data import CLASSES


def run(*arguments: str) -> subprocess.CompletedProcess:
    return commands.run("-m", "synister_jax.aggregate", *arguments)


def test_command_calls_under_several_rules(tmp_path: pathlib.Path) -> None:
    table = drawn(3000, neurons=50)
    files.write_feather(tmp_path / "p.feather", table)
    counts = np.arange(9).reshape(3, 3) + 9 * np.eye(3)
    metrics = {"classes": CLASSES, "synapses": {"confusion": counts.tolist()}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    every = ",".join(voting_rules.RULES)
    arguments = [f"--predictions={tmp_path}/p.feather", f"--rule={every}"]
    arguments += [f"--confusion={tmp_path}/metrics.json", "--min_probability=0.6"]
    done = run(*arguments, f"--output={tmp_path}/new/neurons.feather")
    assert done.returncode == 0, done.stderr
    assert "50 groups from 3,000 rows" in done.stdout
    for rule in voting_rules.RULES:
        assert f"  {rule}: " in done.stdout
    answer = feather.read_table(tmp_path / "new" / "neurons.feather")
    assert answer["rule"].to_pylist() == [*voting_rules.RULES] * 50
    ids = answer["neuron_id"].to_numpy()
    assert (np.diff(ids) >= 0).all() and len(np.unique(ids)) == 50
    about = json.loads(answer.schema.metadata[b"synister_jax"])
    assert about["min_probability"] == 0.6 and set(about["rules"]) == {
        *voting_rules.RULES
    }
    assert about["confusion"] == f"{tmp_path}/metrics.json"
    # The rows of a rule equal the rows that the functions return.
    tally = vote_tallies.count([table], CLASSES, "neuron", min_probability=0.6)
    alone = group_calls.call(tally, "banc")
    own = answer.filter(pa.compute.equal(answer["rule"], "banc"))
    assert own.replace_schema_metadata(alone.schema.metadata).equals(alone)
    # If an option is missing or wrong, the command writes nothing.
    done = run(*arguments, "--by=hemilineage", "--min_probability=calibrated")
    assert done.returncode == 2 and "output" in done.stderr
    done = run(*arguments, "--min_probability=2", f"--output={tmp_path}/o.feather")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "--min_probability=2: give a number from 0 to 1" in done.stderr
    assert not (tmp_path / "o.feather").exists()


def test_feather_and_folders_of_parquet_are_the_same(tmp_path: pathlib.Path) -> None:
    table = drawn(700)
    files.write_feather(tmp_path / "p.feather", table)
    (tmp_path / "parts").mkdir()
    for number, first in enumerate(range(0, 700, 300)):
        path = tmp_path / "parts" / f"part-{number:05d}.parquet"
        parquet.write_table(table.slice(first, 300), path)
    answers = [
        group_calls.of(
            predictions.open(tmp_path / name), "hemilineage", "cleft_weighted"
        )
        for name in ("p.feather", "parts")
    ]
    assert answers[0].equals(answers[1]) and len(answers[0]) == 7
    assert answers[0]["hemilineage"].to_pylist() == sorted(f"H{i}" for i in range(7))


def test_groups_that_nobody_names(tmp_path: pathlib.Path) -> None:
    files.write_feather(tmp_path / "p.feather", table_of([[1, 0, 0]], {}))
    source = predictions.open(tmp_path / "p.feather")
    with pytest.raises(UserError, match="names no cell type: its column cell_type is"):
        group_calls.of(source, "cell_type")
    files.write_feather(tmp_path / "e.feather", drawn(9).slice(0, 0))
    with pytest.raises(UserError, match="names no neuron"):
        group_calls.of(predictions.open(tmp_path / "e.feather"), "neuron")


def test_the_threshold_that_calibration_left(tmp_path: pathlib.Path) -> None:
    for name, about in (("with", {"abstain_below": 0.75}), ("without", {})):
        table = table_of([[1, 0, 0]], {"neuron_id": [1]}, about=about)
        files.write_feather(tmp_path / f"{name}.feather", table)
    source = predictions.open(tmp_path / "with.feather")
    assert aggregate.threshold("calibrated", source) == 0.75
    assert aggregate.threshold("0.5", source) == 0.5
    without = predictions.open(tmp_path / "without.feather")
    with pytest.raises(UserError, match="has no threshold .* predict with --calibrate"):
        aggregate.threshold("calibrated", without)
    for text in ("nan", "-1", "1.5", "much"):
        with pytest.raises(UserError, match=f"--min_probability={text}: give a number"):
            aggregate.threshold(text, source)


def test_not_a_prediction_table(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "p.feather"
    files.write_feather(path, pa.table({"a": [1]}))
    with pytest.raises(UserError, match="p.feather is not a prediction table"):
        predictions.open(path)
    files.write_feather(path, drawn(9).drop_columns("nt_gaba_prob"))
    with pytest.raises(UserError, match="no column nt_gaba_prob"):
        predictions.open(path)
    files.write_feather(path, drawn(5000))
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match="cannot read predictions"):
        predictions.open(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no Parquet file in it"):
        predictions.open(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot read predictions .*none"):
        predictions.open(tmp_path / "none.feather")


def test_files_of_a_folder_must_be_of_one_answer(tmp_path: pathlib.Path) -> None:
    table = drawn(20)
    parquet.write_table(table, tmp_path / "a.parquet")
    other = table.rename_columns(
        [n.replace("nt_gaba", "nt_histamine") for n in table.column_names]
    )
    parquet.write_table(other, tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet has other columns or classes than"):
        predictions.open(tmp_path)


def test_what_is_read_is_not_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "p.feather"
    files.write_feather(path, drawn(50))
    (tmp_path / "link.feather").symlink_to(path)
    for same in (
        path,
        tmp_path / "link.feather",
        f"{tmp_path}/../{tmp_path.name}/p.feather",
    ):
        with pytest.raises(UserError, match="is the input; name another file"):
            files.require_other(same, path)
    done = run(f"--predictions={path}", f"--output={path}")
    assert done.returncode == 1 and "is the input" in done.stderr
    assert len(predictions.load(path)) == 50


def test_a_rule_that_lacks_something_is_told_before_anything_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = drawn(50).drop_columns("cleft_score")
    files.write_feather(tmp_path / "p.feather", table)
    source = predictions.open(tmp_path / "p.feather")
    monkeypatch.setattr(vote_tallies, "count", None)
    for rule in ("flyem", "cleft_weighted"):
        with pytest.raises(UserError, match=f"the rule {rule} needs"):
            group_calls.of(source, "neuron", rule)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("neuron_id", pa.float64()), ("nt_gaba_prob", pa.float64())],
)
def test_columns_of_other_types_are_refused(
    tmp_path: pathlib.Path, name: str, kind: pa.DataType
) -> None:
    table = drawn(50, nan=0)
    place = table.schema.get_field_index(name)
    changed = table.set_column(place, name, table[name].cast(kind, safe=False))
    files.write_feather(tmp_path / "p.feather", changed)
    with pytest.raises(UserError, match=f"column {name} is double, not "):
        predictions.open(tmp_path / "p.feather")
