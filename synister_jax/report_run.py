# SPDX-License-Identifier: Apache-2.0
"""What the report's page shows of a run: training, calibration, evaluated parts."""

import base64
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax import (
    charts,
    checkpoint,
    data,
    figures,
    files,
    measurement,
    metrics,
    predictions,
    report_neurons,
    report_predictions,
    synapses,
    temperatures,
)
from synister_jax.shards import Shards

_TILES = 4  # of each class and kind on the contact sheet
# A part's metrics.json may be of an earlier version, or of a table that names none.
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


def content(workdir: pathlib.Path) -> dict[str, Any]:
    """Training facts, curves, what `calibrate` fitted and what `evaluate` found.

    Raises:
      UserError: it is not a run, or its shards are not where they were.
    """
    config = checkpoint.load_config(workdir)
    shards = data.open_shards(config, training=False)
    run: dict[str, Any] = {
        "workdir": workdir.name,
        "manifest": shards.manifest,
        "config": config,
        "examples": _examples(shards, config.split),
        "steps": checkpoint.steps(workdir),
        "curves": [],
        "parts": [],
        "calibrations": _calibrations(workdir),
    }
    if lines := metrics.read(workdir):
        for ends in ("loss", "accuracy"):
            draw = functools.partial(figures.curves, lines, [ends])
            run["curves"].append(
                (f"{ends} against step", figures.inline_svg(draw, ends))
            )
    crop_yx = tuple(config.crop_shape_zyx[1:])
    for part in reversed(synapses.PARTS):
        folder = workdir / "evaluation" / part
        if (folder / "summary.json").exists():
            run["parts"].append(_part(folder, part, shards, crop_yx))
    return run


def _examples(shards: Shards, split: str) -> list[tuple[str, list[int]]]:
    """For each class the number of crops in train, validation and test."""
    labels = synapses.labels(shards.index, shards.classes)
    in_part = [synapses.in_part(shards.index, split, part) for part in synapses.PARTS]
    return [
        (name, [int((rows & (labels == index)).sum()) for rows in in_part])
        for index, name in enumerate(shards.classes)
    ]


def _calibrations(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What `calibrate` left, by step: fitted on validation, then checked elsewhere."""
    found = []
    for step in checkpoint.steps(workdir):
        fitted = temperatures.path_of(workdir, step)
        if not fitted.exists():
            continue
        for path in (fitted, *sorted(fitted.parent.glob(f"check-*-step-{step}.json"))):
            measured = files.read_json(path)
            title = f"{measured['part']}, step {step}: {measured['rows']:,} synapses"
            draw = functools.partial(charts.calibration, measured, title)
            chart = figures.inline_svg(draw, path.name)
            found.append(measured | {"chart": chart})
    return found


def _part(
    folder: pathlib.Path, part: str, shards: Shards, crop_yx: tuple[int, int]
) -> dict[str, Any]:
    """What `evaluate` found on a part, for the best of its checkpoints."""
    summary = files.read_json(folder / "summary.json")
    best_step, entries = summary["best_step"], summary["checkpoints"]
    best = folder / f"step-{best_step}"
    measured = dict.fromkeys(_MAY_BE_ABSENT)
    measured |= files.read_json(best / "metrics.json")
    source = predictions.open(best / "predictions.feather")
    shown = report_predictions.content(source, measurement.RULE)
    found = {
        "name": part,
        "summary": summary,
        "measured": measured,
        "classes": shown["classes"],
        "hemilineages": shown["hemilineages"],
        "neurons": shown["neurons"],
        "variants": _pivot(measured["neuron_variants"] or []),
        "sheet": _sheet(predictions.load(source.path), shards, crop_yx),
        "checkpoints": None,
    }
    if len(entries) > 1:
        draw = functools.partial(figures.checkpoints, entries, best_step)
        found["checkpoints"] = figures.inline_svg(draw, part)
    return found


def _pivot(variants: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Accuracy of neurons: a row a least number of synapses, a column a cut-off."""
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
) -> list[tuple[report_neurons.Class, list[tuple[str, list[dict[str, Any]]]]]]:
    """For each true class the surest right calls, the least sure, the surest wrong.

    A tile is the section through the synapse, as wide as the network's crop.
    """
    classes = predictions.classes(table)
    legend = report_neurons.legend(classes)
    record_of = {s: i for i, s in enumerate(shards.index["synapse_id"].to_pylist())}
    # Evaluation may have run on other shards than the run's own.
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
            ("most confident of the right", surest(right, -top)),
            ("least sure (smallest margin)", surest(known, top - runner_up)),
            ("most confident of the wrong", surest(known & ~right, -top)),
        ]
        sheet.append((of_class, kinds))
    return sheet
