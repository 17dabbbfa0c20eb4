# SPDX-License-Identifier: Apache-2.0
"""Evaluates checkpoints on a whole part of the split, or a table of predictions.

    python -m synister_jax.evaluate --workdir=RUN --part=validation --steps=1000,2000
    python -m synister_jax.evaluate --workdir=RUN --part=test
    python -m synister_jax.evaluate --predictions=FEATHER --part=test --output=DIR

Writes RUN/evaluation/<part>/step-<n>/{metrics.json, predictions.feather,
confusion_synapses.png, confusion_neurons.png}, RUN/evaluation/<part>/summary.json,
which names the best of all checkpoints evaluated so far, and accuracy.png of several;
of a table of predictions DIR/{metrics.json, confusion_*.png}. docs/evaluation.md says
what is in metrics.json.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from absl import flags

from synister_jax.base import command, figures, files
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.evaluation import metrics
from synister_jax.network import checkpoint, inference, sharding
from synister_jax.tables import predictions, synapses
from synister_jax.training import input_pipeline
from synister_jax.training.validation import SplitPart


@dataclasses.dataclass(frozen=True)
class Variants:
    """Of neurons so large and so sure; see `metrics.measure`."""

    n_mins: tuple[int, ...] = metrics.N_MIN
    cutoffs: tuple[float, ...] = metrics.CUTOFFS

    @classmethod
    def of(cls, n_mins: Sequence[str], cutoffs: Sequence[str]) -> "Variants":
        """Of the flags' texts; `UserError` for what is not possible."""
        try:
            found = cls(tuple(map(int, n_mins)), tuple(map(float, cutoffs)))
        except ValueError as error:
            raise UserError(f"--n_min or --cutoff: {error}") from None
        if min(found.n_mins, default=1) < 1:
            raise UserError(f"--n_min={','.join(n_mins)}: numbers from 1 up")
        if not all(0 <= cutoff <= 1 for cutoff in found.cutoffs):
            raise UserError(f"--cutoff={','.join(cutoffs)}: shares, from 0 to 1")
        return found


def evaluate(
    workdir: pathlib.Path,
    part_name: str,
    steps: Sequence[int] | None = None,
    shards_folder: str | None = None,
    batch_size: int = 32,
    variants: Variants = Variants(),
) -> dict[str, Any]:
    """Evaluates the checkpoints of `steps` (the latest when None); returns the summary.

    Raises:
      UserError: unknown part or step, shards that do not fit the run.
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
        # Gone while its neighbours are replaced: a folder that has it is complete.
        (step_folder / "metrics.json").unlink(missing_ok=True)
        files.write_feather(step_folder / "predictions.feather", table)
        _write(step_folder, f"{part_name}, step {step}", identity, table, variants)
    return _summarise(folder, part_name, crops_sha256, checkpoint.steps(workdir))


def evaluate_table(
    path: pathlib.Path,
    output: pathlib.Path,
    part: tuple[str, str] | None = None,
    variants: Variants = Variants(),
) -> dict[str, Any]:
    """Measures a table of predictions that fits into memory; returns metrics.json.

    Args:
      part: (split, part): only its rows.

    Raises:
      UserError: it is none, has no such part, or no row with a known transmitter.
    """
    table = predictions.load(path)
    what = f"all rows of {path.name}"
    if part is not None:
        table = table.filter(pa.array(synapses.in_part(table, *part)))
        what = f"{part[1]} of {path.name}"
    if not (synapses.labels(table, predictions.classes(table)) >= 0).any():
        raise UserError(
            f"{what} has no row whose neurotransmitter is one of the classes "
            f"{', '.join(predictions.classes(table))}: there is nothing to compare with"
        )
    identity = {"predictions": str(path), "part": None if part is None else part[1]}
    return _write(files.make_folder(output), what, identity, table, variants)


def _write(
    folder: pathlib.Path,
    what: str,
    identity: dict[str, Any],
    table: pa.Table,
    variants: Variants,
) -> dict[str, Any]:
    """Pictures, then metrics.json; says the accuracies."""
    measured = metrics.measure(table, variants.n_mins, variants.cutoffs)
    classes = list(predictions.classes(table))
    lines = [f"{what}:"]
    for name in ("synapses", "neurons"):
        numbers = measured[name]
        shown = figures.confusion(
            np.asarray(numbers["confusion"]),
            classes,
            f"{what}: {numbers['count']:,} {name}, accuracy "
            f"{_shown(numbers['accuracy'])}",
        )
        files.write_bytes(folder / f"confusion_{name}.png", figures.png(shown))
        lines.append(
            f"{numbers['count']:,} {name}, {_shown(numbers['accuracy'])} right"
            f"{_interval(numbers)} "
            f"({_shown(numbers['mean_class_accuracy'])} mean over classes);"
        )
    content = identity | {"classes": classes} | measured
    files.write_json(folder / "metrics.json", content)
    print(" ".join(lines).rstrip(";"), flush=True)
    return content


def _interval(numbers: Mapping[str, Any]) -> str:
    limits = numbers["interval"]["accuracy"]
    return "" if limits is None else " [{:.3f}, {:.3f}]".format(*limits)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _summarise(
    folder: pathlib.Path, part: str, crops_sha256: str, there: Sequence[int]
) -> dict[str, Any]:
    """Names the best checkpoint among all that have been evaluated on the part."""
    all_metrics = [files.read_json(p) for p in folder.glob("step-*/metrics.json")]
    # Of these crops, by checkpoints that are still there.
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
    # Of equal ones the latest, as in training.
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


_OF_A_RUN = ("steps", "shards", "batch_size")  # flags


def main() -> None:
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.")
    table = flags.DEFINE_string("predictions", None, "Or a table of predictions.")
    output = flags.DEFINE_string("output", None, "Folder for what is said of it.")
    part = flags.DEFINE_string("part", "validation", "validation, test or train.")
    split = flags.DEFINE_string("split", "skeleton", "Split of --predictions' --part.")
    steps = flags.DEFINE_list(
        "steps", None, "Checkpoints: numbers, `all`, or `best` (of validation)."
    )
    shards = flags.DEFINE_string("shards", None, "Shards, if moved since training.")
    batch_size = flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
    n_min = flags.DEFINE_list(
        "n_min", list(map(str, metrics.N_MIN)), "Neurons of so many synapses."
    )
    cutoff = flags.DEFINE_list(
        "cutoff",
        list(map(str, metrics.CUTOFFS)),
        "Neurons whose winner has such a share of votes.",
    )

    def run() -> None:
        variants = Variants.of(n_min.value, cutoff.value)
        if (workdir.value is None) == (table.value is None):
            raise UserError("give either --workdir or --predictions with --output")
        useless = ["output", "split"] if table.value is None else _OF_A_RUN
        for name in useless:
            if flags.FLAGS[name].present:
                raise UserError(f"--{name} means nothing here; leave it out")
        if table.value is not None:
            if output.value is None:
                raise UserError("--predictions needs --output, a folder")
            of_part = (split.value, part.value) if flags.FLAGS["part"].present else None
            if of_part is None and flags.FLAGS["split"].present:
                raise UserError(f"--split={split.value} without --part: give both")
            evaluate_table(
                pathlib.Path(table.value), pathlib.Path(output.value), of_part, variants
            )
            return
        assert workdir.value is not None  # one of the two is given
        run_folder = pathlib.Path(workdir.value)
        evaluate(
            run_folder,
            part.value,
            checkpoint.parse_steps(run_folder, steps.value),
            shards.value,
            batch_size.value,
            variants,
        )

    command.run(run)


if __name__ == "__main__":
    main()
