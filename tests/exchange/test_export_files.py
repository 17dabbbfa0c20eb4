# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from pyarrow import feather

from synister_jax.base.errors import UserError
from synister_jax.evaluation import group_calls
from synister_jax.exchange.export_files import ExportOptions
from synister_jax.tables import predictions
from tests.helpers import prediction_tables
from tests.helpers.prediction_tables import (
    CALLS,
    NEURON,
    NEURONS,
    SIX,
    VOXEL,
    confusion,
    export_to,
    probabilities,
    read_csv,
)


def test_a_class_without_a_column(tmp_path: pathlib.Path) -> None:
    classes = (*SIX, "neither")
    table = prediction_tables.make(
        [NEURON] * 4, ["neither", "neither", "gaba", None], classes
    )
    with pytest.raises(UserError, match="no column for 'neither'.*--drop_classes=nei"):
        export_to(tmp_path, "codex", table)
    output, _ = export_to(tmp_path, "codex", table, drop_classes=("neither",))
    [row] = read_csv(output / "neurons.csv.gz")
    means = {n: probabilities(table, n)[:3].mean(dtype=np.float64) for n in SIX}
    assert float(row["gaba_avg"]) == means["gaba"]  # not rescaled to a sum of 1
    assert float(row["nt_type_score"]) == max(means.values())
    content = json.loads((output / "export.json").read_text())
    assert content["options"]["drop_classes"] == ["neither"]
    with pytest.raises(UserError, match="--drop_classes=tyramine: .* no such class"):
        export_to(tmp_path, "codex", table, drop_classes=("tyramine",))
    with pytest.raises(UserError, match=r"distinguish the classes \(none\): choose"):
        export_to(tmp_path, "codex", table, drop_classes=classes)


def test_two_classes_of_one_name(tmp_path: pathlib.Path) -> None:
    classes = ("gaba", "neither", "unknown")
    table = prediction_tables.make([NEURON], ["gaba"], classes)
    options = ExportOptions((40, 4, 4), confusion(tmp_path, classes))
    with pytest.raises(UserError, match="cannot distinguish the classes .*: choose"):
        export_to(tmp_path, "flyem", table, options)


@pytest.mark.parametrize("to", ["fafbseg", "cave", "codex", "neuprint", "banc"])
def test_nothing_predicted(tmp_path: pathlib.Path, to: str) -> None:
    table = prediction_tables.make([NEURON, NEURON + 1], [None, None])
    options = VOXEL if to == "neuprint" else ExportOptions()
    output, _ = export_to(tmp_path, to, table, options)
    for path in output.glob("*.csv*"):
        assert len(read_csv(path)) == 2
    for path in output.glob("*.feather"):
        assert len(feather.read_table(path)) == 2


def test_no_rows(tmp_path: pathlib.Path) -> None:
    output, _ = export_to(tmp_path, "cave", prediction_tables.make([], []))
    assert len(feather.read_table(output / "synapses_nt_v1.feather")) == 0


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("codex", {"neurons": [None, None]}, "names no neuron"),
        ("flyem", {"options": ExportOptions((8, 8, 8))}, "flyem needs --confusion=RUN"),
        ("neuprint", {}, "needs --voxel_size_nm_zyx, as 8,8,8"),
        ("synister", {"options": VOXEL}, "needs --predict"),
        ("cave", {"options": VOXEL}, "does not take --voxel_size_nm_zyx"),
    ],
)
def test_mistakes(
    tmp_path: pathlib.Path, to: str, changes: dict[str, Any], message: str
) -> None:
    neurons = changes.get("neurons", [NEURON, NEURON])
    table = prediction_tables.make(neurons, ["gaba", None])
    with pytest.raises(UserError, match=message):
        export_to(tmp_path, to, table, changes.get("options", ExportOptions()))
    assert not (tmp_path / to).exists()


def test_confusion_of_another_network(tmp_path: pathlib.Path) -> None:
    table = prediction_tables.make(NEURONS, CALLS)
    other = confusion(tmp_path, ("gaba", "neither"))
    with pytest.raises(UserError, match="give the confusion of the network that"):
        export_to(tmp_path, "flyem", table, ExportOptions((40, 4, 4), other))


def test_voxel_size_of_the_record(tmp_path: pathlib.Path) -> None:
    record = {"file": "predictions.feather", "voxel_size_nm_zyx": [20, 8, 2]}
    (tmp_path / "predictions.json").write_text(json.dumps(record))
    table = prediction_tables.make(NEURONS, CALLS)
    output, _ = export_to(tmp_path, "neuprint", table)
    row = read_csv(output / "Neuprint_Synapses.csv")[1]
    assert row["location:point{srid:9157}"] == "{x:6, y:1, z:2}"
    row = json.loads((output / "export.json").read_text())["options"]
    assert row["voxel_size_nm_zyx"] == [20, 8, 2]
    (tmp_path / "predictions.json").write_text(json.dumps(record | {"file": "other"}))
    with pytest.raises(UserError, match="needs --voxel_size_nm_zyx"):
        export_to(tmp_path, "neuprint", table)


def test_the_same_calls_as_aggregate(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(3)
    neurons = [NEURON + int(i) for i in rng.integers(0, 9, 200)]
    drawn = [SIX[i] for i in rng.integers(0, 6, 200)]
    table = prediction_tables.make(neurons, drawn)
    output, _ = export_to(tmp_path, "banc", table)
    path = prediction_tables.write(tmp_path, table)
    expected = group_calls.of(predictions.open(path), "neuron", "banc")
    rows = read_csv(output / "banc_neurotransmitter_prediction.csv")
    called = expected["predicted_neurotransmitter"].to_pylist()
    assert [row["neurotransmitter_predicted"] for row in rows] == called
    assert [int(row["root_id"]) for row in rows] == expected["neuron_id"].to_pylist()
