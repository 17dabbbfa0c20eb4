# SPDX-License-Identifier: Apache-2.0
"""Evaluates checkpoints on a whole part of the split, per synapse and per neuron.

    python -m synister_jax.evaluate --workdir=RUN --part=validation --steps=1000,2000
    python -m synister_jax.evaluate --workdir=RUN --part=test

Writes RUN/evaluation/<part>/step-<n>/{metrics.json, predictions.feather,
confusion_synapses.png, confusion_neurons.png} and RUN/evaluation/<part>/summary.json,
which names the best of all checkpoints evaluated so far.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from absl import flags

from synister_jax import (
    aggregate,
    checkpoint,
    command,
    data,
    figures,
    files,
    inference,
    metrics,
    predictions,
    sharding,
    synapses,
)
from synister_jax.command import UserError
from synister_jax.shards import Shards


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a split, all of it: every number is over every example."""

    name: str
    shards: Shards
    rows: np.ndarray  # of the shards' index, [n]
    table: pa.Table  # these rows of the index

    @classmethod
    def of(cls, shards: Shards, split: str, name: str) -> "Part":
        """The part `name` of the split; `UserError` when it is empty or unknown."""
        rows = np.flatnonzero(synapses.in_part(shards.index, split, name))
        if not len(rows):
            raise UserError(
                f"shards {shards.folder}: part {name!r} of {split!r} is empty"
            )
        return cls(name, shards, rows, shards.index.take(pa.array(rows)))

    def predict(
        self,
        classify_batch: Callable[[jax.Array], jax.Array],
        batch_size: int,
        mesh: jax.sharding.Mesh,
        about: dict[str, Any],
    ) -> pa.Table:
        """The prediction table of the part, whatever the batch size."""
        batches = data.padded_batches(
            self.shards, self.rows, batch_size, sharding.batch(mesh)
        )
        results = [np.asarray(classify_batch(batch["crop"])) for batch in batches]
        probabilities = np.concatenate(results)[: len(self.rows)]
        status = self.table["status"].to_pylist()
        return predictions.build(
            self.table, probabilities, status, self.shards.classes, about
        )


def measure(table: pa.Table) -> dict[str, Any]:
    """The numbers of a prediction table of labelled synapses.

    `synapses` and `neurons` are `metrics.summary` of either; `loss` is the mean
    cross-entropy in nats. Synapses without neuron count in `synapses` alone.
    """
    classes = predictions.classes(table)
    truth = synapses.labels(table, classes)
    called = predictions.called(table)
    known = (truth >= 0) & (called >= 0)
    likelihood = predictions.probabilities(table)[known, truth[known]]
    neurons = aggregate.majority(table, "neuron")
    neuron_truth = synapses.labels(neurons, classes)
    neuron_called = synapses.index_in(neurons["predicted_neurotransmitter"], classes)
    k = len(classes)
    return {
        # float32 softmax can be 0; its smallest number bounds the logarithm.
        "loss": float(-np.log(np.maximum(likelihood, 1e-38), dtype=np.float64).mean()),
        "synapses": metrics.summary(metrics.confusion(truth, called, k), classes),
        "neurons": {
            "rule": "majority vote, ties to the first class",
            **metrics.summary(
                metrics.confusion(neuron_truth, neuron_called, k), classes
            ),
        },
    }


def scalars(part: str, measured: dict[str, Any]) -> dict[str, float]:
    """What a run logs of `measure`; nothing of what is undefined."""
    synapses_, neurons = measured["synapses"], measured["neurons"]
    values = {
        f"{part}/loss": measured["loss"],
        f"{part}/synapse_accuracy": synapses_["accuracy"],
        f"{part}/synapse_mean_class_accuracy": synapses_["mean_class_accuracy"],
        f"{part}/synapse_macro_f1": synapses_["macro_f1"],
        f"{part}/neuron_accuracy": neurons["accuracy"],
    }
    return {name: value for name, value in values.items() if value is not None}


def evaluate(
    workdir: pathlib.Path,
    part_name: str,
    steps: Sequence[int] | None = None,
    shards_folder: str | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Evaluates the checkpoints of `steps` (the latest when None); returns the summary.

    Raises:
      UserError: unknown part or step, shards that do not fit the run.
    """
    config = checkpoint.load_config(workdir)
    if shards_folder is not None:
        config.shards = shards_folder
    mesh = sharding.make_mesh()
    shards = data.open_shards(config, training=False)
    part = Part.of(shards, config.split, part_name)
    chosen = [checkpoint.choose_step(workdir, step) for step in steps or [None]]
    folder = files.make_folder(workdir / "evaluation" / part_name)
    crops_sha256 = shards.sha256(config.split)
    batches = math.ceil(len(part.rows) / batch_size)
    progress = command.Progress("evaluate", len(chosen) * batches, "batches")
    for step in chosen:
        classifier = inference.Classifier([(workdir, step)], batch_size, mesh)

        def classify_batch(
            records: jax.Array, classifier: inference.Classifier = classifier
        ) -> np.ndarray:
            result = np.asarray(classifier.start(records))
            progress.add()
            return result

        about = {"workdir": str(workdir), "step": step, "part": part_name}
        about |= {"split": config.split, "volume": shards.manifest["volume"]}
        table = part.predict(classify_batch, batch_size, mesh, about)
        identity = {"step": step, "split": config.split, "crops": crops_sha256}
        _write(folder / f"step-{step}", identity, table, part)
    return _summarise(folder, part_name, crops_sha256, checkpoint.steps(workdir))


def _write(
    folder: pathlib.Path, identity: dict[str, Any], table: pa.Table, part: Part
) -> None:
    step = identity["step"]
    folder = files.make_folder(folder)
    measured = measure(table)
    classes = list(part.shards.classes)
    # Gone while its neighbours are replaced: a folder with metrics.json is complete.
    (folder / "metrics.json").unlink(missing_ok=True)
    files.write_feather(folder / "predictions.feather", table)
    for what in ("synapses", "neurons"):
        numbers = measured[what]
        title = (
            f"{part.name}, step {step}: {numbers['count']:,} {what}, "
            f"accuracy {_shown(numbers['accuracy'])}"
        )
        picture = figures.confusion(np.asarray(numbers["confusion"]), classes, title)
        with files.replacing(folder / f"confusion_{what}.png") as partial:
            partial.write_bytes(figures.png(picture))
    about = identity | {"part": part.name, "classes": classes}
    files.write_json(folder / "metrics.json", about | measured)
    lines = [f"step {step}, {part.name}:"]
    for what in ("synapses", "neurons"):
        numbers = measured[what]
        lines.append(
            f"{numbers['count']:,} {what}, {_shown(numbers['accuracy'])} right "
            f"({_shown(numbers['mean_class_accuracy'])} mean over classes);"
        )
    print(" ".join(lines).rstrip(";"), flush=True)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _summarise(
    folder: pathlib.Path, part: str, crops_sha256: str, there: Sequence[int]
) -> dict[str, Any]:
    """Names the best checkpoint among all that have been evaluated on the part."""
    all_metrics = [files.read_json(p) for p in folder.glob("step-*/metrics.json")]
    # Of these crops, by checkpoints that are still there.
    all_metrics = [
        m for m in all_metrics if m["crops"] == crops_sha256 and m["step"] in there
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
    # Of equal ones the latest, as in training.
    best = max(entries, key=lambda e: (e["synapse_mean_class_accuracy"], e["step"]))
    summary = {"part": part, "best_step": best["step"]}
    summary |= {"best_by": "synapse_mean_class_accuracy", "checkpoints": entries}
    files.write_json(folder / "summary.json", summary)
    print(
        f"best of {len(entries)} on {part}: step {best['step']} (mean over classes "
        f"{best['synapse_mean_class_accuracy']:.3f} per synapse); "
        f"{folder}/summary.json",
        flush=True,
    )
    return summary


def main() -> None:
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.")
    part = flags.DEFINE_string("part", "validation", "validation, test or train.")
    steps = flags.DEFINE_list(
        "steps", None, "Checkpoints: numbers, `all`, or `best` (of validation)."
    )
    shards = flags.DEFINE_string("shards", None, "Shards, if moved since training.")
    batch_size = flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
    flags.mark_flag_as_required("workdir")
    command.run(
        lambda: evaluate(
            pathlib.Path(workdir.value),
            part.value,
            checkpoint.parse_steps(pathlib.Path(workdir.value), steps.value),
            shards.value,
            batch_size.value,
        )
    )


if __name__ == "__main__":
    main()
