# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from synister_jax.base import figures
from synister_jax.evaluation import calibration, intervals
from tests.helpers import pictures


def measured(precision: float | None = 0.96) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet((0.4, 0.4, 0.4), 400)
    truth = np.where(rng.random(400) < 0.7, probabilities.argmax(1), 2)
    found = calibration.reliability(probabilities, truth)
    return {
        "before": found,
        "after": found,
        "temperature": 1.25,
        "precision_target": 0.95,
        "abstain_below": None if precision is None else 0.8,
        "coverage": None if precision is None else 0.4,
        "precision": precision,
        "curve": calibration.Curve.of(probabilities, truth).points(),
    }


def test_the_numbers_are_in_the_chart() -> None:
    numbers = measured()
    figure = figures.calibration(numbers, "of what", intervals.wilson)
    assert figure.get_suptitle() == "of what"
    before, _, after, _, coverage = figure.axes
    ece = numbers["before"]["ece"]
    assert before.get_title() == f"before: T 1, ECE {ece:.3f}"
    assert after.get_title() == f"after: T 1.25, ECE {ece:.3f}"
    assert coverage.get_title() == "at or above 0.800: 0.40 kept, 0.960 right"
    filled = [b for b in numbers["before"]["bins"] if b["count"]]
    heights = [bar.get_height() for bar in before.patches]
    assert heights == [b["accuracy"] for b in filled]
    # Each bar is within its bin, and each accuracy within its interval.
    for bar, one in zip(before.patches, filled, strict=True):
        assert one["low"] < bar.get_x() < bar.get_x() + bar.get_width() < one["high"]
    drawn = before.lines[1:-1]
    for line, one in zip(drawn, filled, strict=True):
        low, high = line.get_ydata()
        assert 0 <= low <= one["accuracy"] <= high <= 1 and high - low > 0.01
    curve, target, chosen = coverage.lines
    assert list(curve.get_xdata()) == [p["coverage"] for p in numbers["curve"]]
    assert set(target.get_ydata()) == {0.95}
    assert (chosen.get_xdata()[0], chosen.get_ydata()[0]) == (0.4, 0.96)
    plt.close(figure)


def test_no_threshold_is_said() -> None:
    figure = figures.calibration(measured(None), "of what", intervals.wilson)
    assert figure.axes[-1].get_title() == "no threshold for 0.95"
    assert len(figure.axes[-1].lines) == 2
    plt.close(figure)


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_paper_and_ink_are_the_style_s(style: str) -> None:
    with plt.style.context(style):
        paper = to_rgb(plt.rcParams["figure.facecolor"])
        picture = pictures.pixels(
            figures.png(figures.calibration(measured(), "of what", intervals.wilson))
        )
    expected = (np.array(paper) * 255).round()
    assert (picture[:3] == expected).all() and (picture[:, :3] == expected).all()
    # The text contrasts with the paper: some pixel of the title is far from it.
    title = picture[:25].astype(int).mean(axis=2)
    assert abs(title - expected[0]).max() > 200
