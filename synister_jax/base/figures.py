# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: confusion matrices, curves, crops."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
# Names of files, splits and classes may contain a dollar sign.
matplotlib.rcParams["text.parse_math"] = False

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Colours of Okabe and Ito, which colour-blind people can tell apart, made lighter so
# that text on them can be read.
_PART_COLOURS = {"train": "#8cc5e8", "validation": "#f2c14e", "test": "#e39aa8"}
_FRAME = "#cf222e"
# Colours that are visible on black and on white: the chart of the calibration sets
# neither background nor ink, so that it works with any matplotlib style.
_BLUE, _ORANGE, _GREY = "#3a8fc9", "#e08214", "#808080"
# Colours that no figure uses otherwise. In a page they are replaced by its own colours.
_INK, _GRID = "#010203", "#010204"
_LINES = [f"#01020{5 + number:x}" for number in range(6)]
_MEANINGS = {_INK: "currentColor", _GRID: "var(--line)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(_LINES)
}
_IN_PAGE: dict[Any, Any] = {  # matplotlib has literal types for the names
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "axes.prop_cycle": plt.cycler(color=_LINES),
    "axes.grid": True,
    "grid.color": _GRID,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def confusion(
    counts: np.ndarray,
    classes: Sequence[str],
    title: str,
    axis_names: tuple[str, str] = ("true", "predicted"),
) -> Figure:
    """Draws a confusion matrix, coloured by the fraction of each row.

    Args:
      counts: int [k, k].
      classes: the k names.
      title: the title of the figure.
      axis_names: what the rows are, and what the columns are.
    """
    rows = counts.sum(axis=1, keepdims=True)
    fraction = counts / np.maximum(rows, 1)
    figure, axes = plt.subplots(figsize=(5.6, 4.8), layout="constrained")
    axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        if not counts[row, column]:
            continue
        axes.text(
            column,
            row,
            f"{fraction[row, column]:.2f}\n{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if fraction[row, column] > 0.55 else "black",
        )
    axes.set_xticks(range(len(classes)), classes, rotation=35, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_ylabel(axis_names[0])
    axes.set_xlabel(axis_names[1])
    axes.set_title(title, fontsize=11)
    return figure


def curves(
    lines: Sequence[Mapping[str, float]], endings: Sequence[str] = ("loss", "accuracy")
) -> Figure:
    """Draws the numbers of metrics.jsonl against the step, a chart for each ending.

    Args:
      lines: the lines of the file.
      endings: a chart shows the numbers whose names end in this.
    """
    figure, grid = plt.subplots(
        1,
        len(endings),
        figsize=(4.6 * len(endings), 3.2),
        layout="constrained",
        squeeze=False,
    )
    for axes, ends in zip(grid[0], endings, strict=True):
        names = sorted({name for x in lines for name in x if name.endswith(ends)})
        for name in names:
            points = [(x["step"], x[name]) for x in lines if name in x]
            is_train = name.startswith("train/")
            style = {"linewidth": 1.3} if is_train else {"marker": "o"}
            axes.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
        axes.set_xlabel("step")
        axes.set_ylabel(ends)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(fontsize=7)
        if ends == "accuracy":
            axes.set_ylim(0, 1.02)
    return figure


def checkpoints(entries: Sequence[Mapping[str, Any]], best_step: int) -> Figure:
    """Draws the accuracies of evaluated checkpoints against the step.

    Args:
      entries: the checkpoints of summary.json, in ascending order.
      best_step: the step that is marked.
    """
    figure, axes = plt.subplots(figsize=(4.8, 3.2), layout="constrained")
    steps = [entry["step"] for entry in entries]
    for what, marker in (("synapse", "o"), ("neuron", "s")):
        for name, style in (("accuracy", "-"), ("mean_class_accuracy", "--")):
            # A part without labelled neurons has no accuracy of neurons.
            values = [entry[f"{what}_{name}"] for entry in entries]
            shown = [np.nan if value is None else value for value in values]
            label = f"{what} {name.replace('_', ' ')}"
            axes.plot(steps, shown, linestyle=style, marker=marker, label=label)
    axes.axvline(best_step, linewidth=1, linestyle=":", alpha=0.7)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8)
    return figure


def augmented(
    records: np.ndarray, crops: np.ndarray, names: Sequence[str], sections: int = 5
) -> Figure:
    """Draws a row for each example: the middle of its record, and sections of its crop.

    Args:
      records: uint8 [n, *record]. A frame shows where the crop is in the record.
      crops: float32 [n, *crop] in [-1, 1], as the network gets them.
      names: the title of each row.
      sections: how many sections of the crop are shown.
    """
    figure, grid = plt.subplots(
        len(records),
        sections + 1,
        figsize=(1.5 * (sections + 1), 1.58 * len(records)),
        layout="constrained",
        squeeze=False,
    )
    shown = np.linspace(0, crops.shape[1] - 1, sections).round().astype(int)
    for axes_row, record, crop, name in zip(grid, records, crops, names, strict=True):
        _framed(axes_row[0], record, crop.shape)
        axes_row[0].set_title(name, fontsize=8, loc="left")
        for axes, z in zip(axes_row[1:], shown, strict=True):
            axes.imshow(crop[z], cmap="gray", vmin=-1, vmax=1)
            axes.set_title(f"section {z}", fontsize=7)
        for axes in axes_row:
            axes.axis("off")
    return figure


def augmentations(
    records: np.ndarray,
    crops: np.ndarray,
    names: Sequence[str],
    voxel_size_nm_zyx: Sequence[float],
    sections: int = 16,
) -> Figure:
    """Draws several augmentations of each example.

    Each example has two rows. The upper row shows the middle section of the record and
    of every crop, and the first crop cut along z, where a displaced section is visible
    as a step. The lower row shows the sections of the first crop side by side.

    Args:
      records: uint8 [n, *record]. A frame shows where the crop is in the record.
      crops: float32 [n, variants, *crop] in [-1, 1], as the network gets them.
      names: the title of each example.
      voxel_size_nm_zyx: the shape of the cut along z.
      sections: show at most this many sections side by side.
    """
    n, variants, depth, height, width = crops.shape
    shown = np.linspace(0, depth - 1, min(depth, sections)).round().astype(int)
    columns, inches = variants + 2, 1.5
    gap = ((0, 0), (0, 0), (0, width // 20))  # a white gap right of each section
    # The height of the lower row, in columns.
    strip = columns * height / ((width + width // 20) * len(shown))
    figure = plt.figure(
        figsize=(inches * columns, (inches * (1 + strip) + 0.6) * n),
        layout="constrained",
    )
    grid = figure.add_gridspec(2 * n, columns, height_ratios=(1, strip) * n)
    grey: dict[str, Any] = {"cmap": "gray", "vmin": -1, "vmax": 1}
    for i, (record, name) in enumerate(zip(records, names, strict=True)):
        first, *middles, along_z = (
            figure.add_subplot(grid[2 * i, column]) for column in range(columns)
        )
        _framed(first, record, crops.shape[2:])
        first.set_title(name, fontsize=8, loc="left")
        for number, axes in enumerate(middles):
            axes.imshow(crops[i, number, depth // 2], **grey)
            axes.set_title(str(number + 1), fontsize=7)
        along_z.imshow(
            crops[i, 0, :, height // 2],
            aspect=voxel_size_nm_zyx[0] / voxel_size_nm_zyx[2],
            interpolation="nearest",
            **grey,
        )
        along_z.set_title("1, z–x", fontsize=7)
        below = figure.add_subplot(grid[2 * i + 1, :], anchor="W")
        side_by_side = np.pad(crops[i, 0, shown], gap, constant_values=1)
        below.imshow(np.hstack(list(side_by_side)), **grey)
        below.set_title(f"1, {len(shown)} of {depth} sections", fontsize=7, loc="left")
        for axes in (first, *middles, along_z, below):
            axes.axis("off")
    return figure


def _framed(axes: Axes, record: np.ndarray, crop_shape_zyx: Sequence[int]) -> None:
    """Draws the middle section of the record, and a frame where the crop is in it."""
    axes.imshow(record[len(record) // 2], cmap="gray", vmin=0, vmax=255)
    height, width = crop_shape_zyx[1:]
    corner = (
        (record.shape[2] - width) / 2 - 0.5,
        (record.shape[1] - height) / 2 - 0.5,
    )
    axes.add_patch(plt.Rectangle(corner, width, height, fill=False, color=_FRAME))


def balance(measured: Mapping[str, Any], fractions: Sequence[float]) -> Figure:
    """Draws the parts of a split by class, and what the parts share.

    The left chart shows the synapses of each class, and lines where train, validation
    and test should end. The right chart shows its neurons. The text below says what is
    in several parts.

    Args:
      measured: the result of `leakage.measure`.
      fractions: the wanted fractions of train, validation and test.
    """
    classes: Mapping[str, Mapping[str, Any]] = measured["classes"]
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(10, 1.9 + 0.42 * len(classes)),
        layout="constrained",
        sharey=True,
        width_ratios=(3, 2),
    )
    rows = range(len(classes))
    for axes, what in ((left, "synapses"), (right, "neurons")):
        before = np.zeros(len(classes))
        totals = np.array([sum(p[what] for p in c.values()) for c in classes.values()])
        for part, colour in _PART_COLOURS.items():
            counts = np.array([of_class[part][what] for of_class in classes.values()])
            share = counts / np.maximum(totals, 1)
            axes.barh(rows, share, left=before, color=colour, label=part)
            for row in np.flatnonzero(share > 0.05):
                axes.text(
                    before[row] + share[row] / 2,
                    row,
                    f"{counts[row]:,}",
                    ha="center",
                    va="center",
                    fontsize=8,
                )
            before += share
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"fraction of {what}")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    for end in np.cumsum(fractions)[:-1]:
        left.axvline(end, color="black", linewidth=1, linestyle=(0, (3, 2)))
    left.set_yticks(rows, classes)
    left.invert_yaxis()
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    left.set_title(f"split {measured['split']!r}", loc="left", fontsize=10)
    shared = [
        f"{found['values']:,} {column.removesuffix('_id').replace('_', ' ')}s"
        for column, found in measured["in_several_parts"].items()
    ]
    figure.supxlabel(
        f"in several parts: {', '.join(shared)}; synapses whose crop shares voxels "
        f"with a crop of another part: {measured['crops']['synapses']:,}",
        fontsize=9,
    )
    return figure


def calibration(
    measured: Mapping[str, Any],
    title: str,
    interval: Callable[[int, int], Sequence[float] | None],
) -> Figure:
    """Draws the reliability before and after the temperature, and the coverage curve.

    Args:
      measured: the content of the JSON file that `calibrate` writes.
      title: the title of the figure.
      interval: a function from (right, count) to the 95 % interval of that share.
    """
    figure = plt.figure(figsize=(10.5, 4.3), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(4, 1), wspace=0.04)
    lower: Axes | None = None
    for column, when in enumerate(("before", "after")):
        upper = figure.add_subplot(grid[0, column])
        lower = figure.add_subplot(grid[1, column], sharex=upper, sharey=lower)
        _reliability(upper, lower, measured[when]["bins"], interval)
        error = measured[when]["ece"]
        temperature = 1 if when == "before" else measured["temperature"]
        upper.set_title(f"{when}: T {temperature:.3g}, ECE {error:.3f}", fontsize=10)
        if column == 0:
            upper.set_ylabel("share right (95 % interval)")
            lower.set_ylabel("synapses")
    _coverage(figure.add_subplot(grid[:, 2]), measured)
    figure.suptitle(title, fontsize=11)
    return figure


def _reliability(
    upper: Axes,
    lower: Axes,
    bins: Sequence[Mapping[str, Any]],
    interval: Callable[[int, int], Sequence[float] | None],
) -> None:
    """Draws the share that is right in each bin of confidence, and the rows below it.

    A dot marks the mean confidence of a bin, and a line its 95 % interval.
    """
    filled = [b for b in bins if b["count"]]
    middles = [(b["low"] + b["high"]) / 2 for b in filled]
    width = 0.9 * (bins[0]["high"] - bins[0]["low"])
    upper.bar(middles, [b["accuracy"] for b in filled], width, color=_BLUE, alpha=0.6)
    upper.plot((0, 1), (0, 1), color=_GREY, linestyle="--", linewidth=1)
    for one in filled:
        right = round(one["accuracy"] * one["count"])
        limits = interval(right, one["count"]) or ()
        upper.plot(
            (one["confidence"],) * len(limits), limits, color=_ORANGE, linewidth=1.5
        )
    upper.plot(
        [b["confidence"] for b in filled],
        [b["accuracy"] for b in filled],
        color=_ORANGE,
        linestyle="none",
        marker="o",
        markersize=5,
        clip_on=False,
    )
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    upper.tick_params(labelbottom=False)
    lower.bar(middles, [b["count"] for b in filled], width, color=_GREY)
    lower.set_xlabel("highest probability")


def _coverage(axes: Axes, measured: Mapping[str, Any]) -> None:
    """Draws which share of the kept calls is right against the share that is kept."""
    points = measured["curve"]
    axes.plot(
        [p["coverage"] for p in points],
        [p["precision"] for p in points],
        color=_BLUE,
    )
    target = measured["precision_target"]
    axes.axhline(target, color=_GREY, linestyle="--", linewidth=1)
    axes.grid(alpha=0.3)
    if measured["precision"] is None:
        axes.set_title(f"no threshold for {target:g}", fontsize=10)
    else:
        chosen = (measured["coverage"], measured["precision"])
        axes.plot(*chosen, color=_ORANGE, marker="o")
        axes.set_title(
            f"at or above {measured['abstain_below']:.3f}: {chosen[0]:.2f} kept, "
            f"{chosen[1]:.3f} right",
            fontsize=10,
        )
    axes.set(xlim=(0, 1.01), xlabel="share kept", ylabel="share of the kept right")
    axes.set_ylim(min(target, *(p["precision"] for p in points)) - 0.02, 1.01)


def inline_svg(draw: Callable[[], Figure], name: str) -> str:
    """Returns the figure as an SVG element that takes its colours from the page's CSS.

    Text stays text. Lines and text have the colour of the surrounding text, and the
    background is transparent. Grids have the colour var(--line), and curves have
    var(--c0) to var(--c5).

    Args:
      draw: makes the figure.
      name: a name that no other figure of the page has, for the ids inside.
    """
    with plt.rc_context(_IN_PAGE | {"svg.hashsalt": name}):
        figure = draw()
        buffer = io.StringIO()
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
        plt.close(figure)
    # These ids of groups would be in the next figure of the page, too.
    text = re.sub(r' id="[\w.]+_\d+"', "", buffer.getvalue())
    for colour, meaning in _MEANINGS.items():
        text = text.replace(colour, meaning)
    return text[text.index("<svg") :]


def grey_png(section: np.ndarray) -> bytes:
    """Returns a section, uint8 [y, x], as a PNG with one pixel for each voxel."""
    buffer = io.BytesIO()
    # Three colour channels, because a grey colour map changes some values by one.
    plt.imsave(buffer, np.repeat(section[..., None], 3, axis=2), format="png")
    return buffer.getvalue()


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Returns the figure as PNG, and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()
