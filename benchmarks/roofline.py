# SPDX-License-Identifier: Apache-2.0
"""The roofline picture: rates against arithmetic intensity, under the machine's roof.

Williams, Waterman and Patterson, CACM 52(4), 2009.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from synister_jax.base import figures

FILE = "roofline.png"

_SIDES = {"ours": "ours", "as_written": "PyTorch as written", "tuned": "PyTorch tuned"}
_MARKERS = {"inference": "s", "training": "D"}
_COLOURS = {"ours": "#0072b2", "as_written": "#d55e00", "tuned": "#e69f00"}


def whole_network(entries: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """{(what, side): GFLOP/s} of the results of one backend; less where some lack."""
    found = {}
    for what, name in (("inference", "predict"), ("training", "train")):
        reports = entries.get("benchmarks", {}).get(name, {}).get("reports", [])
        measured = reports[0]["allocators"].get("default", {}) if reports else {}
        # Training's sides come in pairs, each with ours.
        pairs = measured.values() if what == "training" else [measured]
        for pair in pairs:
            for side, gflops in pair.get("gflops", {}).items():
                if side in _SIDES:
                    found.setdefault((what, side), gflops)
    return found


def draw(layers: Mapping[str, Any], others: Mapping[tuple[str, str], float]) -> bytes:
    """PNG of a report of bench_layers.py, and whole networks' rates in GFLOP/s.

    A whole network has the intensity of its layers together: in training operations
    and bytes are both some three times as many.
    """
    figure, axes = figures.plt.subplots(figsize=(8, 5), layout="constrained")
    points = layers["layers"]
    peak, bandwidth = layers["peak_gflops"], layers["bandwidth_gb_per_s"]
    intensities = [point["flop_per_byte"] for point in points]
    ends = np.array([min(intensities) / 2, max(*intensities, peak / bandwidth) * 3])
    x = np.geomspace(*ends, 200)
    axes.plot(x, np.minimum(peak, x * bandwidth), color="#444444", label="roof")
    axes.text(
        ends[1], peak * 1.06, f"{peak:,.0f} GFLOP/s", ha="right", va="bottom", size=8
    )
    middle = np.sqrt(ends[0] * peak / bandwidth)
    axes.annotate(
        f"{bandwidth:,.1f} GB/s",
        (middle, middle * bandwidth),
        (-6, 6),
        textcoords="offset points",
        ha="right",
        size=8,
    )
    rates = [point["gflops"] for point in points]
    label = "layer, inference"
    axes.plot(intensities, rates, "o", color="#009e73", markersize=5, label=label)
    for index, point in enumerate(points):
        name = point["name"].replace("level", "").replace("_conv", ".")
        place = (point["flop_per_byte"], point["gflops"])
        # Neighbours lie close together: above and below in turn.
        offset = (4, -10 if index % 2 else 4)
        axes.annotate(name, place, offset, textcoords="offset points", size=7)
    for (what, side), gflops in others.items():
        axes.plot(
            layers["flop_per_byte"],
            gflops,
            _MARKERS[what],
            color=_COLOURS[side],
            fillstyle="full" if what == "inference" else "none",
            label=f"{what}, {_SIDES[side]}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # figures.py has no mathematics in text
    axes.set_xlabel("FLOP for each byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(
        f"{layers['device']}, {layers['compute_dtype']}, batch {layers['batch_size']}",
        loc="left",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figures.png(figure)
