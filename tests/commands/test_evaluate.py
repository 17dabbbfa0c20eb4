# SPDX-License-Identifier: Apache-2.0
import functools
import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest

from synister_jax.base.errors import UserError
from synister_jax.evaluation import accuracy, measured_table, metrics
from synister_jax.network import checkpoint, inference, sharding
from synister_jax.tables import predictions
from synister_jax.training import (
    checkpoint_evaluation,
    input_pipeline,
    metrics_log,
    validation,
)


@pytest.mark.long
def test_independent_of_batch_size_and_devices(
    short_run: pathlib.Path, short_config: ml_collections.ConfigDict
) -> None:
    part = validation.SplitPart.of(
        input_pipeline.open_shards(short_config), "skeleton", "test"
    )
    tables = []
    for batch_size, devices in ((3, 1), (7, 1), (4, 4), (64, 1)):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        classifier = inference.Classifier([(short_run, 20)], batch_size, mesh)
        tables.append(part.predict(classifier.start, batch_size, mesh, {}))
    first = predictions.probabilities(tables[0])
    assert len(first) == len(part.rows) and not np.isnan(first).any()
    for table in tables[1:]:
        np.testing.assert_allclose(predictions.probabilities(table), first, atol=1e-5)
        a, b = metrics.measure(tables[0]), metrics.measure(table)
        assert a["synapses"] == b["synapses"] and a["neurons"] == b["neurons"]


@pytest.mark.long
def test_command_writes_numbers_pictures_and_the_best(short_run: pathlib.Path) -> None:
    summary = checkpoint_evaluation.evaluate(
        short_run, "validation", [10, 20], batch_size=8
    )
    folder = short_run / "evaluation" / "validation"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert [c["step"] for c in summary["checkpoints"]] == [10, 20]
    means = [c["synapse_mean_class_accuracy"] for c in summary["checkpoints"]]
    # Of two equal checkpoints, the later is the best.
    assert summary["best_step"] == (10 if means[0] > means[1] else 20)
    assert checkpoint.best_step(short_run) == summary["best_step"]
    for step in (10, 20):
        found = {p.name for p in (folder / f"step-{step}").iterdir()}
        assert found == {
            "metrics.json",
            "predictions.feather",
            "confusion_synapses.png",
            "confusion_neurons.png",
        }
    # The validation during training gives the same numbers at this step.
    measured = json.loads((folder / "step-20" / "metrics.json").read_text())
    [logged] = [x for x in metrics_log.read(short_run) if "validation/loss" in x]
    for name, value in metrics.scalars("validation", measured).items():
        assert logged[name] == pytest.approx(value, rel=1e-4)


def test_confusion_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    truth, called = rng.integers(-1, 5, (2, 500))
    expected = np.zeros((5, 5), int)
    for t, c in zip(truth, called, strict=True):
        if t >= 0 and c >= 0:
            expected[t, c] += 1
    np.testing.assert_array_equal(accuracy.confusion(truth, called, 5), expected)
    names = list("abcde")
    recall = [expected[i, i] / expected[i].sum() for i in range(5)]
    summary = accuracy.summary(expected, names)
    assert summary["mean_class_accuracy"] == pytest.approx(np.mean(recall))
    assert summary["accuracy"] == pytest.approx(np.trace(expected) / expected.sum())


def test_writer_tells_one_story_after_a_resume(tmp_path: pathlib.Path) -> None:
    writer = metrics_log.MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": 1 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    writer = metrics_log.MetricsLog(tmp_path, 3)
    writer.write(4, {"loss": 0.0})
    writer.close()
    assert [line["step"] for line in metrics_log.read(tmp_path)] == [1, 2, 3, 4]
    assert metrics_log.read(tmp_path)[-1]["loss"] == 0


def test_mistakes(short_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no part 'testing'"):
        checkpoint_evaluation.evaluate(short_run, "testing")
    with pytest.raises(UserError, match="no checkpoint of step 15; there are 10, 20"):
        checkpoint_evaluation.evaluate(short_run, "test", [15])
    with pytest.raises(UserError, match="are not there"):
        checkpoint_evaluation.evaluate(
            short_run, "test", shards_folder=str(tmp_path / "none")
        )
    with pytest.raises(UserError, match="give numbers, `all` or `best`"):
        checkpoint.parse_steps(short_run, ["last"])
    assert checkpoint.parse_steps(short_run, ["all"]) == [10, 20]
    with pytest.raises(UserError, match="not the folder of a run"):
        checkpoint.load_config(tmp_path)


@pytest.mark.long
def test_part_predictions_keep_ids(
    short_run: pathlib.Path, short_config: ml_collections.ConfigDict
) -> None:
    shards = input_pipeline.open_shards(short_config)
    part = validation.SplitPart.of(shards, "skeleton", "validation")
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


def test_variants_that_are_not_possible() -> None:
    assert measured_table.NeuronSelections.of(["5"], ["0.5"]).n_mins == (5,)
    for n_mins, cutoffs, why in (
        (["-3"], ["0"], "--n_min=-3: give numbers from 1 up"),
        (["x"], ["0"], "--n_min or --cutoff: invalid literal"),
        (["1"], ["nan"], "--cutoff=nan: give shares from 0 to 1"),
        (["1"], ["2"], "--cutoff=2: give shares"),
    ):
        with pytest.raises(UserError, match=why):
            measured_table.NeuronSelections.of(n_mins, cutoffs)


@pytest.mark.long
def test_a_table_of_predictions(
    short_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A table has the same numbers as the checkpoint that made the table."""
    checkpoint_evaluation.evaluate(short_run, "test", [20])
    folder = short_run / "evaluation" / "test" / "step-20"
    part = ("skeleton", "test")
    found = measured_table.evaluate_table(
        folder / "predictions.feather", tmp_path, part
    )
    whole = json.loads((folder / "metrics.json").read_text())
    written = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("synapses", "neurons", "loss", "calibration", "correlation"):
        assert found[name] == whole[name] == written[name]
    assert (tmp_path / "confusion_synapses.png").exists()
    with pytest.raises(UserError, match="train of predictions.feather has no row"):
        measured_table.evaluate_table(
            folder / "predictions.feather", tmp_path, ("skeleton", "train")
        )
