# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import feather

from synister_jax import one_transmitter
from synister_jax.base.errors import UserError
from synister_jax.evaluation import confusions, mixtures
from synister_jax.tables import predictions
from tests.helpers.prediction_tables import table_of
from tests.helpers.small_data import CLASSES

# Confusion matrices: each class has 100 labelled synapses, which belong to 10 neurons.
SYNAPSES = np.array([[90, 6, 4], [5, 85, 10], [8, 2, 90]])
NEURONS = np.array([[10, 0, 0], [0, 9, 1], [0, 0, 10]])
FIRST_ID = 720_575_940_600_000_000
# For each neuron: its hemilineage, and how many synapses are called each class.
MADE: dict[int, tuple[str | None, tuple[int, int, int]]] = {
    0: ("A", (90, 5, 5)),
    1: ("A", (50, 2, 48)),  # two transmitters
    2: ("A", (18, 1, 1)),
    3: ("B", (1, 20, 1)),
    4: ("B", (2, 1, 0)),
    5: ("B", (1, 0, 0)),  # too few
    6: ("C", (0, 0, 0)),  # nothing is predicted
    7: (None, (1, 1, 30)),
    **{n: ("D", (20, 0, 0) if n % 2 else (0, 0, 20)) for n in range(10, 22)},
}


def table() -> pa.Table:
    rows: list[tuple[int, str | None, list[float]]] = []
    for neuron, (hemilineage, calls) in MADE.items():
        for label, count in enumerate(calls):
            probabilities = [0.1] * 3
            probabilities[label] = 0.8
            rows += [(neuron, hemilineage, probabilities)] * count
        rows.append((neuron, hemilineage, [np.nan] * 3))
    order = np.random.default_rng(0).permutation(len(rows))
    columns = {
        "neuron_id": [FIRST_ID + rows[i][0] for i in order],
        "hemilineage": [rows[i][1] for i in order],
    }
    return table_of([rows[i][2] for i in order], columns)


@pytest.fixture
def source(tmp_path: pathlib.Path) -> predictions.Predictions:
    path = tmp_path / "predictions.feather"
    feather.write_feather(table(), str(path))
    return predictions.open(path)


def metrics(
    path: pathlib.Path,
    synapses_within: float | None = 0.02,
    neurons_within: float | None = None,
    **more: Any,
) -> pathlib.Path:
    """Writes metrics.json, whose classes have another order than in the predictions."""
    order = [2, 0, 1]
    content = {
        "classes": [CLASSES[i] for i in order],
        "synapses": {"confusion": SYNAPSES[np.ix_(order, order)].tolist()},
        "neurons": {"confusion": NEURONS[np.ix_(order, order)].tolist()},
        "hemilineages": None,
        "correlation": {
            "synapses_within_neurons": synapses_within,
            "neurons_within_hemilineages": neurons_within,
        },
    }
    file = path / "metrics.json"
    file.write_text(json.dumps(content | more))
    return file


def loaded(path: pathlib.Path, level: str) -> confusions.Confusion:
    return confusions.load(path, level).for_classes(CLASSES)


def csv(path: pathlib.Path, rows: np.ndarray) -> confusions.Confusion:
    file = path / "confusion.csv"
    lines = [["", *CLASSES]]
    lines += [[name, *map(str, row)] for name, row in zip(CLASSES, rows, strict=True)]
    file.write_text("\n".join(",".join(line) for line in lines))
    return loaded(file, "synapses")


def test_synapses_are_the_units_of_neurons(source: predictions.Predictions) -> None:
    groups, counts = one_transmitter.units(source, "neuron")
    assert groups.to_pylist() == [FIRST_ID + neuron for neuron in sorted(MADE)]
    assert [tuple(row) for row in counts.tolist()] == [MADE[n][1] for n in sorted(MADE)]


def test_neurons_are_the_units_of_hemilineages(
    source: predictions.Predictions,
) -> None:
    groups, counts = one_transmitter.units(source, "hemilineage")
    assert groups.to_pylist() == ["A", "B", "C", "D"]
    assert counts.tolist() == [[3, 0, 0], [2, 1, 0], [0, 0, 0], [6, 0, 6]]
    with pytest.raises(UserError, match="names no cell type: its column cell_type"):
        one_transmitter.units(source, "cell_type")


def test_model_of_synapses(tmp_path: pathlib.Path) -> None:
    confusion = loaded(metrics(tmp_path), "synapses")
    model = one_transmitter.model(confusion, "synapses", None)
    expected = mixtures.from_counts(SYNAPSES, 0.02, NEURONS.sum(axis=1))
    np.testing.assert_allclose(model.confusion, expected.confusion)
    np.testing.assert_allclose(model.concentration, expected.concentration)
    assert model.correlation == 0.02
    assert one_transmitter.model(confusion, "synapses", 0.3).correlation == 0.3


def test_model_of_neurons(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = one_transmitter.model(loaded(metrics(tmp_path), "neurons"), "neurons", None)
    assert model.correlation == 0
    assert "warning" in (shown := capsys.readouterr().out) and "independent" in shown
    np.testing.assert_allclose(model.concentration, 11.5)
    hemilineages = {"confusion": [[2, 0, 0], [4, 0, 0], [0, 5, 0]]}
    path = metrics(tmp_path, neurons_within=0.2, hemilineages=hemilineages)
    model = one_transmitter.model(loaded(path, "neurons"), "neurons", None)
    assert model.correlation == 0.2 and not capsys.readouterr().out
    # The ten neurons of each class are in 4, 5 and 2 hemilineages. The rows of the
    # matrix have another order of classes.
    worth = [10 / (1 + (10 / g - 1) * 0.2) + 1.5 for g in (4, 5, 2)]
    np.testing.assert_allclose(model.concentration, worth)


def test_model_of_a_published_matrix(tmp_path: pathlib.Path) -> None:
    rows = np.array([[0.9, 0.06, 0.03], [0.05, 0.85, 0.1], [0.08, 0, 0.92]])
    model = one_transmitter.model(csv(tmp_path, rows), "synapses", 0.1)
    assert np.isinf(model.concentration).all()
    assert model.confusion[2, 1] == pytest.approx(0.005 / 1.005)
    counts = one_transmitter.model(csv(tmp_path, SYNAPSES), "synapses", 0.1)
    np.testing.assert_allclose(counts.concentration, 101.5)


def test_what_cannot_be_a_model(tmp_path: pathlib.Path) -> None:
    columns = SYNAPSES / SYNAPSES.sum(axis=0) * [0.5, 1, 1]  # not by rows
    with pytest.raises(UserError, match=r"row of gaba sums to 0\.\d\d, not 1.*P\(call"):
        one_transmitter.model(csv(tmp_path, columns), "synapses", 0.1)
    with pytest.raises(UserError, match="give --correlation"):
        rows = SYNAPSES / SYNAPSES.sum(axis=1, keepdims=True)
        one_transmitter.model(csv(tmp_path, rows), "neurons", None)
    with pytest.raises(UserError, match="give --correlation"):
        one_transmitter.model(csv(tmp_path, SYNAPSES), "synapses", None)
    unknown = loaded(metrics(tmp_path, synapses_within=None), "synapses")
    with pytest.raises(UserError, match="how much the calls of the synapses"):
        one_transmitter.model(unknown, "synapses", None)
    with pytest.raises(UserError, match="a correlation of 1 .* is not possible"):
        one_transmitter.model(unknown, "synapses", 1.0)
    with pytest.raises(UserError, match="of only one true class"):
        one_class = csv(tmp_path, np.array([[8, 1, 0], [0, 0, 0], [0, 0, 0]]))
        one_transmitter.model(one_class, "synapses", 0.1)


def judged(source: predictions.Predictions, by: str, path: pathlib.Path) -> pa.Table:
    level = one_transmitter.UNITS[by]
    model = one_transmitter.model(loaded(path, level), level, None)
    groups, counts = one_transmitter.units(source, by)
    found = one_transmitter.judge(counts, model, CLASSES, 0.05, 999)
    return found.add_column(0, "group", groups)


def test_verdicts_on_neurons(
    tmp_path: pathlib.Path, source: predictions.Predictions
) -> None:
    rows = {
        row["group"] - FIRST_ID: row
        for row in judged(source, "neuron", metrics(tmp_path)).to_pylist()
    }
    verdicts = {n: rows[n]["verdict"] for n in range(8)}
    assert verdicts == {
        **dict.fromkeys((0, 2, 3, 7), "one"),
        1: "several",
        4: "too_few",
        5: "too_few",
        6: "not_predicted",
    }
    mixed = rows[1]
    assert {mixed["first_neurotransmitter"], mixed["second_neurotransmitter"]} == {
        CLASSES[0],
        CLASSES[2],
    }
    assert 0.4 <= mixed["second_share"] <= 0.5
    assert mixed["statistic"] > 10 and mixed["p_value"] <= mixed["q_value"] <= 0.05
    assert [mixed[f"count_{name}"] for name in CLASSES] == [50, 2, 48]
    alone = rows[0]
    assert alone["single_neurotransmitter"] == alone["first_neurotransmitter"]
    assert alone["single_neurotransmitter"] == CLASSES[0]
    assert rows[5]["single_neurotransmitter"] == CLASSES[0]
    assert rows[5]["second_neurotransmitter"] is None and rows[5]["second_share"] == 0
    for few in (rows[4], rows[5], rows[6]):
        assert few["p_value"] is None and few["q_value"] is None
    for name, value in rows[6].items():
        defined = (
            "group",
            "units",
            "verdict",
            "rule",
            *(f"count_{c}" for c in CLASSES),
        )
        assert (value is None) == (name not in defined)
    assert rows[6]["units"] == 0
    assert "correlation 0.02" in alone["rule"] and "999 draws" in alone["rule"]


def test_verdicts_on_hemilineages(
    tmp_path: pathlib.Path, source: predictions.Predictions
) -> None:
    found = judged(source, "hemilineage", metrics(tmp_path, neurons_within=0.0))
    rows = {row["group"]: row for row in found.to_pylist()}
    assert rows["D"]["verdict"] == "several" and rows["D"]["second_share"] == 0.5
    assert rows["C"]["verdict"] == "not_predicted"
    assert rows["A"]["verdict"] in ("one", "too_few")
    tested = [row for row in rows.values() if row["p_value"] is not None]
    # The q-values of Benjamini and Hochberg are computed again by hand.
    p = sorted(row["p_value"] for row in tested)
    for row in tested:
        above = [v * len(p) / (i + 1) for i, v in enumerate(p) if v >= row["p_value"]]
        assert row["q_value"] == pytest.approx(min(1, *above, 1))


def test_few_draws_are_said_to_be_few() -> None:
    verdict = ["one"] * 3_000 + ["too_few"] * 5
    found = pa.table({"verdict": pa.array(verdict)})
    text = one_transmitter.summary(found, 0.05, 999)
    assert text.startswith("3,000 one, 5 too_few\n")
    # The smallest p-value is 1 / (999 + 1) = 60 · 0.05 / 3,000.
    assert (
        "if fewer than 60 of the 3,000 tested groups" in text
        and "--draws=9999 " in text
    )
    assert "\n" not in one_transmitter.summary(found, 0.05, 99_999)
    few = found.filter(pc.field("verdict") == "too_few")
    assert "\nnothing was tested" in one_transmitter.summary(few, 0.05, 999)


def test_command_in_another_process_finds_the_same(
    tmp_path: pathlib.Path, source: predictions.Predictions
) -> None:
    output, path = tmp_path / "neurons.feather", metrics(tmp_path)
    command = [sys.executable, "-m", "synister_jax.one_transmitter", "--by=neuron"]
    command += [f"--predictions={source.path}", f"--confusion={path}"]
    command += [f"--output={output}", "--draws=999"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{output}: 20 groups; units are synapses" in done.stdout
    found = feather.read_table(output)
    here = judged(source, "neuron", path).rename_columns({"group": "neuron_id"})
    assert found.equals(here) and found["neuron_id"].type == pa.int64()
    about = json.loads(found.schema.metadata[b"synister_jax"])
    assert about["correlation"] == 0.02 and about["units"] == "synapses"


def test_small_neurons_are_no_units(
    tmp_path: pathlib.Path,
    source: predictions.Predictions,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hemilineage B has neurons with 22, 3 and 1 predicted synapses."""
    every = dict(
        zip(*map(list, one_transmitter.units(source, "hemilineage")), strict=True)
    )
    assert every[pa.scalar("B")].sum() == 3 and not capsys.readouterr().out.count(
        "no units"
    )
    groups, counts = one_transmitter.units(source, "hemilineage", n_min=20)
    assert groups.to_pylist() == ["A", "B", "C", "D"]
    assert counts.sum(axis=1).tolist() == [3, 1, 0, 12]
    assert (
        "have fewer than 20 predicted synapses and are not counted"
        in capsys.readouterr().out
    )


def test_how_large_neurons_must_be(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = metrics(tmp_path)
    assert one_transmitter.least_synapses(loaded(path, "neurons")) == 1
    assert "does not say how large its neurons are" in capsys.readouterr().out
    content = json.loads(path.read_text())
    content["neurons"]["tenth_of_synapses"] = 40
    path.write_text(json.dumps(content))
    assert one_transmitter.least_synapses(loaded(path, "neurons")) == 40
    assert not capsys.readouterr().out
