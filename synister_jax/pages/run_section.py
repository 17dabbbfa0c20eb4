# SPDX-License-Identifier: Apache-2.0
"""Collects what the report shows about a run: training, evaluation, calibration."""

import base64
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.base import figures, files
from synister_jax.base.errors import UserError
from synister_jax.evaluation import intervals, metrics
from synister_jax.network import checkpoint, saved_calibration
from synister_jax.pages import neurons_table, predictions_section
from synister_jax.tables import predictions, synapses
from synister_jax.training import input_pipeline, metrics_log
from synister_jax.training.shards import Shards

_TILES = 4  # crops of each class and kind on the contact sheet
# metrics.json lacks these fields if an earlier version wrote the file, or if the table
# has no hemilineages, cell types or brain regions.
_MAY_BE_ABSENT = (
    "hemilineages",
    "cell_types",
    "brain_regions",
    "expected_probability",
    "neuron_variants",
    "accuracy_by_synapses",
    "correlation",
    "calibration",
)
_COUNTED = ("count", "accuracy", "mean_class_accuracy", "confusion")
_OF_CHECKPOINTS = ("step", "loss") + tuple(
    f"{what}_{name}"
    for what in ("synapse", "neuron")
    for name in ("accuracy", "mean_class_accuracy")
)
_CALIBRATED = (
    "part",
    "rows",
    "temperature",
    "before",
    "after",
    "curve",
    "coverage",
    "precision",
    "precision_target",
    "abstain_below",
)


def content(
    workdir: pathlib.Path, shards_folder: pathlib.Path | None = None
) -> dict[str, Any]:
    """Returns what the template run.html.j2 needs.

    If the shards of the run cannot be read, the counts by class and the crops are left
    out.

    Args:
      workdir: the run.
      shards_folder: the folder of the shards, if they were moved after training.

    Raises:
      UserError: `workdir` is not a run. `shards_folder` does not belong to the run. A
        file of the evaluation or calibration is missing or damaged.
    """
    config = checkpoint.load_config(workdir)
    if shards_folder is not None:
        config.shards = str(shards_folder)
    shards, why_none = None, None
    try:
        shards = input_pipeline.open_shards(config, training=False)
    except UserError as error:
        if shards_folder is not None:
            raise
        why_none = str(error)
    run: dict[str, Any] = {
        "workdir": workdir.name,
        "manifest": None if shards is None else shards.manifest,
        "without_shards": why_none,
        "config": config,
        "examples": [] if shards is None else _examples(shards, config.split),
        "steps": checkpoint.steps(workdir),
        "curves": [],
        "parts": [],
        "calibrations": _calibrations(workdir),
    }
    if lines := metrics_log.read(workdir):
        for ends in ("loss", "accuracy"):
            draw = functools.partial(figures.curves, lines, [ends])
            run["curves"].append(
                (f"{ends} against step", figures.inline_svg(draw, ends))
            )
    crop_yx = tuple(config.crop_shape_zyx[1:])
    for part in reversed(synapses.PARTS):
        folder = workdir / "evaluation" / part
        if (folder / "summary.json").exists():
            run["parts"].append(_part(workdir, part, shards, crop_yx))
    return run


def _read(path: pathlib.Path, names: Sequence[str], command: str) -> dict[str, Any]:
    """Returns the JSON object of a file.

    Raises:
      UserError: The file cannot be read, or lacks one of `names`. The message says that
        `command` must run again.
    """
    again = f"run `python -m synister_jax.{command}` again"
    try:
        found = files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    _require(found, names, path, again)
    return found


def _require(found: Any, names: Sequence[str], path: pathlib.Path, again: str) -> None:
    there = found if isinstance(found, dict) else {}
    if lacking := [name for name in names if name not in there]:
        raise UserError(
            f"{path} is damaged: the file lacks {', '.join(lacking)}; {again}"
        )


def _examples(shards: Shards, split: str) -> list[tuple[str, list[int]]]:
    """Returns for each class the number of crops in train, validation and test."""
    labels = synapses.labels(shards.index, shards.classes)
    in_part = [synapses.in_part(shards.index, split, part) for part in synapses.PARTS]
    return [
        (name, [int((rows & (labels == index)).sum()) for rows in in_part])
        for index, name in enumerate(shards.classes)
    ]


def _calibrations(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the calibrations by step: the fit on validation, then the checks."""
    found = []
    for step in checkpoint.steps(workdir):
        fitted = saved_calibration.path_of(workdir, step)
        if not fitted.exists():
            continue
        for path in (fitted, *sorted(fitted.parent.glob(f"check-*-step-{step}.json"))):
            check = " --check=test" if path != fitted else ""
            command = f"calibrate --workdir={workdir} --steps={step}{check}"
            measured = _read(path, _CALIBRATED, command)
            title = f"{measured['part']}, step {step}: {measured['rows']:,} synapses"
            draw = functools.partial(
                figures.calibration, measured, title, intervals.wilson
            )
            chart = figures.inline_svg(draw, path.name)
            found.append(measured | {"chart": chart})
    return found


def _part(
    workdir: pathlib.Path,
    part: str,
    shards: Shards | None,
    crop_yx: tuple[int, int],
) -> dict[str, Any]:
    """Returns what `evaluate` found on a part, for the best of its checkpoints."""
    folder = workdir / "evaluation" / part
    summary, measured = _evaluated(workdir, part)
    best_step, entries = summary["best_step"], summary["checkpoints"]
    path = folder / f"step-{best_step}" / "predictions.feather"
    try:
        source = predictions.open(path)
    except UserError as error:
        command = f"evaluate --workdir={workdir} --part={part} --steps={best_step}"
        raise UserError(
            f"{error}; run `python -m synister_jax.{command}` again"
        ) from None
    shown = predictions_section.content(source, metrics.RULE)
    found = {
        "name": part,
        "summary": summary,
        "measured": measured,
        "classes": shown["classes"],
        "hemilineages": shown["hemilineages"],
        "neurons": shown["neurons"],
        "variants": _pivot(measured["neuron_variants"] or []),
        "sheet": [],
        "checkpoints": None,
    }
    if shards is not None:
        found["sheet"] = _sheet(predictions.whole(source), shards, crop_yx)
    if len(entries) > 1:
        draw = functools.partial(figures.checkpoints, entries, best_step)
        found["checkpoints"] = figures.inline_svg(draw, part)
    return found


def _evaluated(
    workdir: pathlib.Path, part: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the contents of summary.json and of the best step's metrics.json.

    Raises:
      UserError: One of these files is missing or damaged.
    """
    folder = workdir / "evaluation" / part
    command = f"evaluate --workdir={workdir} --part={part}"
    path = folder / "summary.json"
    again = f"run `python -m synister_jax.{command}` again"
    summary = _read(path, ("best_step", "checkpoints"), command)
    entries = summary["checkpoints"]
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is damaged: the file names no checkpoint; {again}")
    for entry in entries:
        _require(entry, _OF_CHECKPOINTS, path, again)
    best = summary["best_step"]
    path = folder / f"step-{best}" / "metrics.json"
    command += f" --steps={best}"
    again = f"run `python -m synister_jax.{command}` again"
    found = _read(path, ("step", "loss", "synapses", "neurons"), command)
    for what in ("synapses", "neurons"):
        _require(found[what], _COUNTED, path, again)
    return summary, dict.fromkeys(_MAY_BE_ABSENT) | found


def _pivot(variants: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the accuracies of neurons as a table.

    A row is a minimum number of synapses. A column is a minimum share of votes.
    """
    if not variants:
        return None
    cells = {(v["n_min"], v["cutoff"]): v for v in variants}
    rows, columns = (sorted(set(keys)) for keys in zip(*cells, strict=True))
    return {
        "columns": columns,
        "rows": [
            (row, [cells.get((row, column)) for column in columns]) for row in rows
        ],
    }


def _sheet(
    table: pa.Table, shards: Shards, crop_yx: tuple[int, int]
) -> list[tuple[neurons_table.LegendEntry, list[tuple[str, list[dict[str, Any]]]]]]:
    """Returns example crops of each true class: surest right, least sure, surest wrong.

    A picture is the section through the synapse, as large as the crop of the network.
    """
    classes = predictions.classes(table)
    legend = neurons_table.legend(classes)
    record_of = {s: i for i, s in enumerate(shards.index["synapse_id"].to_pylist())}
    # The evaluation may have used other shards than the run, so some ids can be absent.
    table = table.filter([i in record_of for i in table["synapse_id"].to_pylist()])
    ids = table["synapse_id"].to_pylist()
    truth = synapses.labels(table, classes)
    called = predictions.called(table)
    probability = predictions.probabilities(table)
    runner_up, top = np.sort(probability, axis=1)[:, -2:].T
    source = shards.source()

    def tile(row: int) -> dict[str, Any]:
        _, crop = shards.decode(source[record_of[ids[row]]])
        section = crop[crop.shape[0] // 2]
        above, left = (np.subtract(section.shape, crop_yx) // 2).tolist()
        section = section[above : above + crop_yx[0], left : left + crop_yx[1]]
        return {
            "png": base64.b64encode(figures.grey_png(section)).decode(),
            "id": ids[row],
            "called": legend[called[row]],
            "probability": float(top[row]),
            "right": bool(called[row] == truth[row]),
        }

    def surest(rows: np.ndarray, by: np.ndarray) -> list[dict[str, Any]]:
        order = np.flatnonzero(rows)[np.argsort(by[rows], kind="stable")]
        return [tile(row) for row in order[:_TILES]]

    sheet = []
    for label, of_class in enumerate(legend):
        known = (truth == label) & (called >= 0)
        right = known & (called == label)
        kinds = [
            ("right calls with the highest probability", surest(right, -top)),
            ("calls with the smallest margin", surest(known, top - runner_up)),
            ("wrong calls with the highest probability", surest(known & ~right, -top)),
        ]
        sheet.append((of_class, kinds))
    return sheet
