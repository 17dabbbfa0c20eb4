# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import pytest

from synister_jax.base import figures
from tests.helpers import pictures

LINES = [
    {"step": 1, "train/loss": 2.0, "validation/synapse_accuracy": 0.2},
    {"step": 2, "train/loss": 1.0, "validation/synapse_accuracy": 0.6},
]


def test_inline_svg_leaves_colours_to_the_page() -> None:
    text = figures.inline_svg(lambda: figures.curves(LINES, ["loss"]), "a")
    assert text.startswith("<svg")
    colours = set(re.findall(r"#[0-9a-f]{6}\b|var\([^)]*\)|currentColor", text))
    assert colours == {"currentColor", "var(--line)", "var(--c0)"}
    assert ">train/loss</text>" in text  # as text, not as outlines
    assert "accuracy" not in text
    # The training curve is opaque, so that it is visible on dark paper too.
    lines = [x for x in re.findall(r"<path[^>]*>", text) if "var(--c0)" in x]
    assert lines and not [x for x in lines if "opacity" in x]


@pytest.mark.long
def test_inline_svgs_of_one_page_share_no_ids() -> None:
    def ids(name: str) -> list[str]:
        text = figures.inline_svg(lambda: figures.curves(LINES), name)
        used = set(re.findall(r"(?:#|url\(#)([mp][0-9a-f]{8,})", text))
        found = re.findall(r' id="([^"]*)"', text)
        assert used == set(found)
        return found

    first, second = ids("first"), ids("second")
    assert len(set(first + second)) == len(first) + len(second)
    assert ids("first") == first  # the same numbers give the same page


def test_checkpoints_without_a_number_have_a_gap() -> None:
    entry = dict.fromkeys(
        ("neuron_accuracy", "neuron_mean_class_accuracy"), None
    ) | dict.fromkeys(("synapse_accuracy", "synapse_mean_class_accuracy"), 0.5)
    figure = figures.checkpoints([{"step": s} | entry for s in (10, 20)], 20)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["synapse accuracy"], [0.5, 0.5])
    assert np.isnan(lines["neuron accuracy"]).all()
    figures.png(figure)  # closes the figure


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_grey_png_is_a_pixel_a_voxel(shape: tuple[int, int]) -> None:
    section = np.random.default_rng(0).integers(40, 90, shape, dtype=np.uint8)
    pixels = pictures.pixels(figures.grey_png(section))
    np.testing.assert_array_equal(pixels, np.repeat(section[..., None], 3, axis=2))
