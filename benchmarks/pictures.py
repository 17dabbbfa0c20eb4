# SPDX-License-Identifier: Apache-2.0
"""Draws the roofline, and the peak memory by the number of rows.

The roofline shows arithmetic rates against the arithmetic intensity, and the highest
rate that the machine allows (the roof): Williams, Waterman and Patterson, CACM 52(4),
2009.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from synister_jax.base import figures

_SIDES = {"ours": "ours", "as_written": "PyTorch as written", "tuned": "PyTorch tuned"}
_MARKERS = {"inference": "s", "training": "D"}
_COLOURS = {"ours": "#0072b2", "as_written": "#d55e00", "tuned": "#e69f00"}


def _whole_network(reports: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Returns the measured rates as {(inference or training, side): GFLOP/s}."""
    found: dict[tuple[str, str], float] = {}
    for what, name in (("inference", "predict"), ("training", "train")):
        measured = reports.get(name, {}).get("allocators", {}).get("default", {})
        # In training, ours is compared with each other side in a measurement of its
        # own.
        for pair in measured.values() if what == "training" else [measured]:
            for side in _SIDES.keys() & pair.get("gflops", {}).keys():
                found.setdefault((what, side), pair["gflops"][side])
    return found


def roofline(reports: Mapping[str, Any]) -> bytes:
    """Returns the roofline as a PNG, from a report of bench_layers.py.

    The picture also shows the rates of whole networks, if they were measured. The
    intensity of a whole network is that of its layers together. This also holds for
    training, where operations and bytes are both about three times as many.

    Args:
      reports: the reports of one backend, by the name of the benchmark. The report
        `layers` is needed.
    """
    layers = reports["layers"]
    figure, axes = figures.plt.subplots(figsize=(8, 5), layout="constrained")
    points = layers["layers"]
    peak, bandwidth = layers["peak_gflops"], layers["bandwidth_gb_per_s"]
    intensities = [point["flop_per_byte"] for point in points]
    ends = np.array([min(intensities) / 2, max(*intensities, peak / bandwidth) * 3])
    x = np.geomspace(*ends, 200)
    axes.plot(x, np.minimum(peak, x * bandwidth), color="#444444", label="roof")
    place = (ends[1], peak * 1.06)
    axes.text(*place, f"{peak:,.0f} GFLOP/s", ha="right", va="bottom", size=8)
    middle = np.sqrt(ends[0] * peak / bandwidth)
    near = {"textcoords": "offset points"}
    place = (middle, middle * bandwidth)
    axes.annotate(f"{bandwidth:,.1f} GB/s", place, (-6, 6), ha="right", size=8, **near)
    rates = [point["gflops"] for point in points]
    label = "layer, inference"
    axes.plot(intensities, rates, "o", color="#009e73", markersize=5, label=label)
    for index, point in enumerate(points):
        name = point["name"].replace("level", "").replace("_conv", ".")
        # Neighbouring points are close. Their names are above and below in turn.
        offset = (4, -10 if index % 2 else 4)
        place = (point["flop_per_byte"], point["gflops"])
        axes.annotate(name, place, offset, size=7, **near)
    for (what, side), gflops in sorted(_whole_network(reports).items()):
        axes.plot(
            layers["flop_per_byte"],
            gflops,
            _MARKERS[what],
            color=_COLOURS[side],
            fillstyle="full" if what == "inference" else "none",
            label=f"{what}, {_SIDES[side]}",
        )
    axes.set(xscale="log", yscale="log", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # figures.py draws no formulas in text
    axes.set_xlabel("FLOP per byte that must be moved")
    axes.set_title(
        f"{layers['device']}, {layers['compute_dtype']}, batch {layers['batch_size']}",
        loc="left",
        fontsize=10,
    )
    return _finished(figure, axes, loc="lower right", fontsize=8)


def peak_memory(sizes: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a PNG of the peak memory that bench_table.py measured, by rows."""
    figure, axes = figures.plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    rows = [size["rows"] for size in sizes]
    for phase, marker in (("plan", "o"), ("merge", "s"), ("aggregate", "^")):
        peaks = [size[phase]["peak_gb"] for size in sizes]
        axes.plot(rows, peaks, marker=marker, label=phase)
    axes.set(xscale="log", xlabel="rows of the synapse table")
    axes.set_ylabel("peak memory, GB")
    axes.set_xticks(rows, [f"{count:,}" for count in rows])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def _finished(figure: Any, axes: Any, **legend: Any) -> bytes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, **legend)
    return figures.png(figure)
