# SPDX-License-Identifier: Apache-2.0
"""Evaluates checkpoints of a run on a whole part of its split."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from synister_jax.base import figures, files
from synister_jax.base.progress import Progress
from synister_jax.evaluation import measured_table
from synister_jax.evaluation.measured_table import NeuronSelections
from synister_jax.network import checkpoint, inference, sharding
from synister_jax.training import input_pipeline
from synister_jax.training.validation import SplitPart


def evaluate(
    workdir: pathlib.Path,
    part_name: str,
    steps: Sequence[int] | None = None,
    shards_folder: str | None = None,
    batch_size: int = 32,
    selections: NeuronSelections = NeuronSelections(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Evaluates checkpoints, writes their files, and returns the summary.

    Args:
      workdir: the folder of the run.
      part_name: train, validation or test.
      steps: the steps of the checkpoints; None takes the latest.
      shards_folder: the shards of the run, if they were moved after training.
      batch_size: how many crops are classified at once; it does not change the numbers.
      selections: the neurons that are also measured on their own.

    Raises:
      UserError: there is no such part or step, or the shards are not those of the run.
    """
    config = checkpoint.load_config(workdir)
    if shards_folder is not None:
        config.shards = shards_folder
    mesh = sharding.make_mesh()
    shards = input_pipeline.open_shards(config, training=False)
    part = SplitPart.of(shards, config.split, part_name)
    chosen = [checkpoint.choose_step(workdir, step) for step in steps or (None,)]
    folder = files.make_folder(workdir / "evaluation" / part_name)
    crops_sha256 = shards.sha256(config.split)
    batches = math.ceil(len(part.rows) / batch_size)
    progress = Progress("evaluate", len(chosen) * batches, "batches")
    for step in chosen:
        classifier = inference.Classifier([(workdir, step)], batch_size, mesh)

        def classify_batch(
            records: jax.Array, classifier: inference.Classifier = classifier
        ) -> np.ndarray:
            result = np.asarray(classifier.start(records))
            progress.add()
            return result

        about = {"part": part_name, "split": config.split}
        about |= classifier.members[0] | {"volume": shards.manifest["volume"]}
        table = part.predict(classify_batch, batch_size, mesh, about)
        identity = {"step": step, "split": config.split, "crops": crops_sha256}
        identity |= {"part": part_name}
        step_folder = files.make_folder(folder / f"step-{step}")
        # A folder that has metrics.json is complete, so it goes first and comes last.
        (step_folder / "metrics.json").unlink(missing_ok=True)
        files.write_feather(step_folder / "predictions.feather", table)
        measured_table.write(
            step_folder, f"{part_name}, step {step}", identity, table, selections
        )
    return _summarise(folder, part_name, crops_sha256, checkpoint.steps(workdir))


def _summarise(
    folder: pathlib.Path, part: str, crops_sha256: str, there: Sequence[int]
) -> dict[str, Any]:
    """Names the best of all checkpoints that were evaluated on the part so far."""
    all_metrics = [files.read_json(p) for p in folder.glob("step-*/metrics.json")]
    # Other crops, and checkpoints that were deleted, do not count.
    all_metrics = [
        m for m in all_metrics if m.get("crops") == crops_sha256 and m["step"] in there
    ]
    entries = [
        {
            "step": m["step"],
            "loss": m["loss"],
            "synapse_accuracy": m["synapses"]["accuracy"],
            "synapse_mean_class_accuracy": m["synapses"]["mean_class_accuracy"],
            "neuron_accuracy": m["neurons"]["accuracy"],
            "neuron_mean_class_accuracy": m["neurons"]["mean_class_accuracy"],
        }
        for m in sorted(all_metrics, key=lambda m: m["step"])
    ]
    # Of equally good checkpoints the latest is the best, as in training.
    best = max(entries, key=lambda e: (e["synapse_mean_class_accuracy"], e["step"]))
    summary = {"part": part, "best_step": best["step"]}
    summary |= {"best_by": "synapse_mean_class_accuracy", "checkpoints": entries}
    if len(entries) > 1:
        shown = figures.checkpoints(entries, best["step"])
        files.write_bytes(folder / "accuracy.png", figures.png(shown))
    files.write_json(folder / "summary.json", summary)
    print(
        f"best of {len(entries)} on {part}: step {best['step']} (mean over classes "
        f"{best['synapse_mean_class_accuracy']:.3f} per synapse); "
        f"{folder}/summary.json",
        flush=True,
    )
    return summary
