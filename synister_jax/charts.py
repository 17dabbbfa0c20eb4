# SPDX-License-Identifier: Apache-2.0
"""Charts of numbers. They say nothing of paper or ink: any matplotlib style will do."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Of Okabe and Ito, for eyes that see colours differently; seen on black and on white.
_BLUE, _ORANGE, _GREY = "#3a8fc9", "#e08214", "#808080"


def calibration(measured: Mapping[str, Any], title: str) -> Figure:
    """Reliability before and after the temperature, and the coverage curve.

    Args:
      measured: as calibrate.py writes it: before, after, curve, and what is abstained.
    """
    figure = plt.figure(figsize=(10.5, 4.3), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(4, 1), wspace=0.04)
    lower: Axes | None = None
    for column, when in enumerate(("before", "after")):
        upper = figure.add_subplot(grid[0, column])
        lower = figure.add_subplot(grid[1, column], sharex=upper, sharey=lower)
        _reliability(upper, lower, measured[when]["bins"])
        error = measured[when]["ece"]
        temperature = 1 if when == "before" else measured["temperature"]
        upper.set_title(f"{when}: T {temperature:.3g}, ECE {error:.3f}", fontsize=10)
        if column == 0:
            upper.set_ylabel("share right (95 % interval)")
            lower.set_ylabel("synapses")
    _coverage(figure.add_subplot(grid[:, 2]), measured)
    figure.suptitle(title, fontsize=11)
    return figure


def _reliability(upper: Axes, lower: Axes, bins: Sequence[Mapping[str, Any]]) -> None:
    """Above the share right in each bin of confidence, below the number of rows.

    A dot lies at the mean confidence, in its 95 % interval.
    """
    filled = [b for b in bins if b["count"]]
    middles = [(b["low"] + b["high"]) / 2 for b in filled]
    width = 0.9 * (bins[0]["high"] - bins[0]["low"])
    upper.bar(middles, [b["accuracy"] for b in filled], width, color=_BLUE, alpha=0.6)
    upper.plot((0, 1), (0, 1), color=_GREY, linestyle="--", linewidth=1)
    for one in filled:
        low, high = _wilson(one["accuracy"], one["count"])
        upper.plot((one["confidence"],) * 2, (low, high), color=_ORANGE, linewidth=1.5)
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


def _wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of so many (Wilson 1927)."""
    z = 1.96
    middle = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return (middle - half) / scale, (middle + half) / scale


def _coverage(axes: Axes, measured: Mapping[str, Any]) -> None:
    """Precision of what is kept against the share that is kept."""
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
