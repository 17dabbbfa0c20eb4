# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about a run, about predictions, or about both.

    python -m synister_jax.report --workdir=RUN --predictions=DIR/predictions.feather \
        --output=report.html
"""

import base64
import collections
import pathlib
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from absl import flags
from matplotlib.figure import Figure

import synister_jax
from synister_jax import (
    aggregate,
    checkpoint,
    command,
    data,
    figures,
    files,
    metrics,
    predictions,
    synapses,
)
from synister_jax.command import UserError
from synister_jax.shards import Shards

_TILES_RIGHT, _TILES_WRONG = 6, 4  # of each class on the contact sheet
_MOST_NEURONS = 500  # rows of a table on the page


def render(workdir: pathlib.Path | None, predictions_path: pathlib.Path | None) -> str:
    """The page as text.

    Args:
      workdir: a run; what was trained on, curves, and what `evaluate` left there.
      predictions_path: predictions whose neurons are listed.

    Raises:
      UserError: neither is given, or one is not what it should be.
    """
    if workdir is None and predictions_path is None:
        raise UserError("give --workdir, --predictions or both")
    content: dict[str, Any] = {"version": synister_jax.__version__}
    if workdir is not None:
        content["run"] = _run(workdir)
    if predictions_path is not None:
        content["predictions"] = _predictions(predictions_path)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("synister_jax", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(content)


def _run(workdir: pathlib.Path) -> dict[str, Any]:
    config = checkpoint.load_config(workdir)
    shards = data.open_shards(config, training=False)
    run = {
        "workdir": workdir.name,
        "manifest": shards.manifest,
        "config": config,
        "examples": _examples(shards, config.split),
        "steps": checkpoint.steps(workdir),
        "parts": [],
    }
    if (workdir / "metrics.jsonl").exists():
        run["curves"] = _embed(figures.curves(metrics.read(workdir)))
    for part in reversed(synapses.PARTS):
        if (workdir / "evaluation" / part / "summary.json").exists():
            run["parts"].append(_part(workdir / "evaluation" / part, part, shards))
    return run


def _examples(shards: Shards, split: str) -> list[tuple[str, list[int]]]:
    """For each class the number of crops in train, validation and test."""
    labels = synapses.labels(shards.index, shards.classes)
    in_part = [synapses.in_part(shards.index, split, part) for part in synapses.PARTS]
    return [
        (name, [int((rows & (labels == index)).sum()) for rows in in_part])
        for index, name in enumerate(shards.classes)
    ]


def _part(folder: pathlib.Path, part: str, shards: Shards) -> dict[str, Any]:
    """What `evaluate` found on a part, for the best of its checkpoints."""
    summary = files.read_json(folder / "summary.json")
    step = summary["best_step"]
    best = folder / f"step-{step}"
    measured = files.read_json(best / "metrics.json")
    table = predictions.load(best / "predictions.feather")
    pictures = [
        _embed(
            figures.confusion(
                np.asarray(measured[what]["confusion"]),
                measured["classes"],
                f"{part}, per {what.removesuffix('s')}, step {step}",
            )
        )
        for what in ("synapses", "neurons")
    ]
    return {
        "name": part,
        "summary": summary,
        "measured": measured,
        "pictures": pictures,
        "sheet": _embed(_contact_sheet(table, shards)),
        "neurons": _neurons(table),
    }


def _contact_sheet(table: pa.Table, shards: Shards) -> Figure:
    """Some right and wrong calls of each class: the section through the synapse."""
    classes = predictions.classes(table)
    record_of = {s: i for i, s in enumerate(shards.index["synapse_id"].to_pylist())}
    ids = table["synapse_id"].to_pylist()
    # Evaluation may have run on other shards than the run's own.
    table = table.filter([synapse_id in record_of for synapse_id in ids])
    ids = table["synapse_id"].to_pylist()
    truth = synapses.labels(table, classes)
    called = predictions.called(table)
    probability = predictions.probabilities(table)
    source = shards.source()
    sheet = collections.OrderedDict()
    for label, name in enumerate(classes):
        right = np.flatnonzero((truth == label) & (called == label))[:_TILES_RIGHT]
        wrong = (truth == label) & (called >= 0) & (called != label)
        wrong = np.flatnonzero(wrong)[:_TILES_WRONG]
        tiles = []
        for row in (*right, *wrong):
            _, crop = shards.decode(source[record_of[ids[row]]])
            caption = f"{classes[called[row]]} {probability[row, called[row]]:.2f}"
            tiles.append((crop[crop.shape[0] // 2], caption, called[row] == label))
        sheet[name] = tiles
    return figures.contact_sheet(sheet, _TILES_RIGHT + _TILES_WRONG)


def _predictions(path: pathlib.Path) -> dict[str, Any]:
    table = predictions.load(path)
    return {
        "path": path.name,
        "about": predictions.about(table),
        "rows": len(table),
        "status": collections.Counter(table["status"].to_pylist()).most_common(),
        "neurons": _neurons(table),
    }


def _neurons(table: pa.Table) -> dict[str, Any]:
    """The neuron table by majority vote, unknown and disputed neurons first."""
    neurons = aggregate.majority(table, "neuron").to_pylist()

    def interest(neuron: dict[str, Any]) -> tuple[bool, bool, float]:
        known, call = neuron["neurotransmitter"], neuron["predicted_neurotransmitter"]
        return (known is not None, known == call, neuron["winning_fraction"] or 0)

    classes = predictions.classes(table)
    for neuron in neurons:
        neuron["counts"] = [neuron[f"count_{name}"] for name in classes]
    neurons.sort(key=interest)
    shown = neurons[:_MOST_NEURONS]
    return {"classes": classes, "rows": shown, "total": len(neurons)}


def _embed(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(figures.png(figure)).decode()


def main() -> None:
    workdir = flags.DEFINE_string("workdir", None, "Folder of a run.")
    table = flags.DEFINE_string("predictions", None, "Feather of predictions.")
    output = flags.DEFINE_string("output", None, "HTML file to write.")
    flags.mark_flag_as_required("output")

    def report() -> None:
        page = render(
            None if workdir.value is None else pathlib.Path(workdir.value),
            None if table.value is None else pathlib.Path(table.value),
        )
        files.make_folder(pathlib.Path(output.value).resolve().parent)
        files.write_text(output.value, page)
        print(f"report: {pathlib.Path(output.value).resolve()}")

    command.run(report)


if __name__ == "__main__":
    main()
