# SPDX-License-Identifier: Apache-2.0
import functools
import json
import pathlib

import jax
import ml_collections
import numpy as np
import pyarrow as pa
import pytest
from conftest import CLASSES

from synister_jax import (
    aggregate,
    checkpoint,
    data,
    evaluate,
    inference,
    measurement,
    metrics,
    predictions,
    sharding,
    tallies,
)
from synister_jax.command import UserError


def test_independent_of_batch_size_and_devices(
    short_run: pathlib.Path, short_config: ml_collections.ConfigDict
) -> None:
    part = evaluate.Part.of(data.open_shards(short_config), "skeleton", "test")
    tables = []
    for batch_size, devices in ((3, 1), (7, 1), (4, 4), (64, 1)):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        classifier = inference.Classifier([(short_run, 20)], batch_size, mesh)
        tables.append(part.predict(classifier.start, batch_size, mesh, {}))
    first = predictions.probabilities(tables[0])
    assert len(first) == len(part.rows) and not np.isnan(first).any()
    for table in tables[1:]:
        np.testing.assert_allclose(predictions.probabilities(table), first, atol=1e-5)
        a, b = measurement.measure(tables[0]), measurement.measure(table)
        assert a["synapses"] == b["synapses"] and a["neurons"] == b["neurons"]


def test_command_writes_numbers_pictures_and_the_best(short_run: pathlib.Path) -> None:
    summary = evaluate.evaluate(short_run, "validation", [10, 20], batch_size=8)
    folder = short_run / "evaluation" / "validation"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert [c["step"] for c in summary["checkpoints"]] == [10, 20]
    accuracy = [c["synapse_mean_class_accuracy"] for c in summary["checkpoints"]]
    # Of equal ones the latest.
    assert summary["best_step"] == (10 if accuracy[0] > accuracy[1] else 20)
    assert checkpoint.best_step(short_run) == summary["best_step"]
    for step in (10, 20):
        found = {p.name for p in (folder / f"step-{step}").iterdir()}
        assert found == {
            "metrics.json",
            "predictions.feather",
            "confusion_synapses.png",
            "confusion_neurons.png",
        }
    # The loop's own validation, at the same step, says the same.
    measured = json.loads((folder / "step-20" / "metrics.json").read_text())
    [logged] = [x for x in metrics.read(short_run) if "validation/loss" in x]
    for name, value in measurement.scalars("validation", measured).items():
        assert logged[name] == pytest.approx(value, rel=1e-4)


def table_of(
    truth: list[str | None], probabilities: list[list[float]], neurons: list[int | None]
) -> pa.Table:
    n = len(truth)
    columns: dict[str, object] = {"synapse_id": list(range(n))}
    columns |= {name: [0.0] * n for name in ("z_nm", "y_nm", "x_nm")}
    columns |= {"neuron_id": pa.array(neurons, pa.int64())}
    columns |= {"neurotransmitter": pa.array(truth, pa.string())}
    for name in ("hemilineage", "brain_region", "cell_type"):
        columns[name] = pa.nulls(n, pa.string())
    return predictions.build(
        pa.table(columns), np.array(probabilities), ["ok"] * n, CLASSES, {}
    )


NAN = [np.nan] * 3


def test_numbers_of_a_small_table() -> None:
    table = table_of(
        ["gaba", "gaba", "gaba", "dopamine", "dopamine", None, "gaba"],
        [[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]]
        + [[0.6, 0.1, 0.3], [0.1, 0.8, 0.1], NAN],
        [1, 1, 1, 2, 2, 3, 4],
    )
    measured = measurement.measure(table)
    # Unpredicted rows are never a class: the last one is nowhere.
    assert measured["synapses"]["confusion"] == [[2, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert measured["synapses"]["accuracy"] == pytest.approx(3 / 5)
    assert measured["synapses"]["mean_class_accuracy"] == pytest.approx(
        (2 / 3 + 1 / 2) / 2
    )
    assert measured["synapses"]["per_class"]["acetylcholine"]["recall"] is None
    # Neuron 1: two of three gaba; neuron 2: a tie, taken by the first class.
    assert measured["neurons"]["confusion"] == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]
    logs = np.log([0.7, 0.2, 0.4, 0.8, 0.3])
    assert measured["loss"] == pytest.approx(-logs.mean(), rel=1e-6)


def test_majority_vote() -> None:
    table = table_of(
        ["gaba", "gaba", "dopamine", "dopamine", None, "gaba"],
        [[0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7], NAN, NAN, [1, 0, 0]],
        [720575940612345678, 720575940612345678, 9, 9, 5, None],
    )
    tally = tallies.count([table], CLASSES, "neuron")
    neurons = aggregate.call(tally, "majority").to_pylist()
    assert [n["neuron_id"] for n in neurons] == [5, 9, 720575940612345678]
    unpredicted, nine, big = neurons
    assert unpredicted["predicted_neurotransmitter"] is None
    assert unpredicted["score"] is None and unpredicted["synapses"] == 1
    assert (nine["synapses"], nine["predicted"]) == (2, 1)
    assert nine["predicted_neurotransmitter"] == nine["neurotransmitter"] == "dopamine"
    assert nine["score"] == 1
    assert big["predicted_neurotransmitter"] == "gaba"  # 1 : 1, the first class
    assert (big["count_gaba"], big["count_acetylcholine"]) == (1, 1)
    assert big["score"] == 0.5 and big["rule"] == "majority"


def test_confusion_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    truth, called = rng.integers(-1, 5, (2, 500))
    expected = np.zeros((5, 5), int)
    for t, c in zip(truth, called, strict=True):
        if t >= 0 and c >= 0:
            expected[t, c] += 1
    np.testing.assert_array_equal(metrics.confusion(truth, called, 5), expected)
    names = list("abcde")
    recall = [expected[i, i] / expected[i].sum() for i in range(5)]
    summary = metrics.summary(expected, names)
    assert summary["mean_class_accuracy"] == pytest.approx(np.mean(recall))
    assert summary["accuracy"] == pytest.approx(np.trace(expected) / expected.sum())


def test_writer_tells_one_story_after_a_resume(tmp_path: pathlib.Path) -> None:
    writer = metrics.Writer(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": 1 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    writer = metrics.Writer(tmp_path, 3)
    writer.write(4, {"loss": 0.0})
    writer.close()
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2, 3, 4]
    assert metrics.read(tmp_path)[-1]["loss"] == 0


def test_mistakes(short_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no part 'testing'"):
        evaluate.evaluate(short_run, "testing")
    with pytest.raises(UserError, match="no checkpoint of step 15; there are 10, 20"):
        evaluate.evaluate(short_run, "test", [15])
    with pytest.raises(UserError, match="are not there"):
        evaluate.evaluate(short_run, "test", shards_folder=str(tmp_path / "none"))
    with pytest.raises(UserError, match="give numbers, `all` or `best`"):
        checkpoint.parse_steps(short_run, ["last"])
    assert checkpoint.parse_steps(short_run, ["all"]) == [10, 20]
    with pytest.raises(UserError, match="not the folder of a run"):
        checkpoint.load_config(tmp_path)


def test_part_predictions_keep_ids(
    short_run: pathlib.Path, short_config: ml_collections.ConfigDict
) -> None:
    shards = data.open_shards(short_config)
    part = evaluate.Part.of(shards, "skeleton", "validation")
    mesh = sharding.make_mesh(jax.devices()[:1])
    classifier = inference.Classifier([(short_run, 20)], 5, mesh)
    classify = functools.partial(classifier.start)
    table = part.predict(classify, 5, mesh, {"step": 20})
    assert predictions.about(table)["step"] == 20
    source = shards.source()
    for place in (0, 3, len(part.rows) - 1):
        synapse_id, record = shards.decode(source[part.rows[place]])
        assert table["synapse_id"][place].as_py() == synapse_id
        np.testing.assert_allclose(
            classifier(record[None])[0],
            predictions.probabilities(table)[place],
            atol=1e-5,
        )
