# SPDX-License-Identifier: Apache-2.0
"""Tests of the report in a real browser, if Chromium or Chrome is installed."""

import csv
import io
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base import files
from synister_jax.pages import report
from synister_jax.tables import predictions, synapses
from synister_jax.training import checkpoint_evaluation
from tests.helpers import html_pages
from tests.helpers.html_pages import CONTRAST

pytestmark = pytest.mark.long

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is absent")

CLASSES = ("gaba", "acetylcholine", "dopamine")
EVIL = "</script><b>=1+1"
NEURONS = 3_000
FIRST_ID = 720_575_940_600_000_000


def _table() -> pa.Table:
    """Neuron i has 1 + i % 5 synapses, but neuron 0 has 120, of which 90 are gaba."""
    neuron = np.repeat(np.arange(NEURONS), 1 + np.arange(NEURONS) % 5)
    called = neuron % 3
    more = np.repeat([0, 1, 2], [89, 20, 10])
    neuron = np.concatenate([neuron, np.zeros(len(more), int)])
    called = np.concatenate([called, more])
    rows = len(neuron)
    probability = np.full((rows, 3), 0.1, np.float32)
    probability[np.arange(rows), called] = 0.8
    table = synapses.conform(
        pa.table(
            {
                "synapse_id": np.arange(rows),
                **dict.fromkeys(synapses.POSITION, np.zeros(rows)),
                "neuron_id": FIRST_ID + neuron,
                # Every fourth neuron has a known class. Its call is right only if i % 3
                # is 1.
                "neurotransmitter": [
                    None if n % 4 else "acetylcholine" for n in neuron
                ],
                "hemilineage": np.array([EVIL, "ALAD1", "DM1"])[neuron % 3],
            }
        ),
        "table",
    )
    status = ["ok"] * rows
    return predictions.build(table, probability, status, CLASSES, {"step": 7})


@pytest.fixture(scope="module")
def page_path(
    tmp_path_factory: pytest.TempPathFactory, evaluated_run: pathlib.Path
) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("page")
    files.write_feather(folder / "p.feather", _table())
    page = folder / "report.html"
    page.write_text(report.render(evaluated_run, folder / "p.feather"))
    return page


@pytest.fixture(scope="module")
def evaluated_run(
    tmp_path_factory: pytest.TempPathFactory, short_run: pathlib.Path
) -> pathlib.Path:
    folder = shutil.copytree(short_run, tmp_path_factory.mktemp("seen") / "run")
    checkpoint_evaluation.evaluate(folder, "test", [20])
    return folder


@pytest.fixture
def page(
    browser: "sync_api.Browser", page_path: pathlib.Path
) -> Iterator["sync_api.Page"]:
    with html_pages.opened(browser, page_path) as page:
        yield page


def _neurons(page: "sync_api.Page") -> "sync_api.Locator":
    return page.locator("#predictions-neurons ~ section.neurons")


def _column(neurons: "sync_api.Locator", number: int) -> list[str]:
    cells = neurons.locator(f"tbody tr:not(.detail) td:nth-child({number})")
    return cells.all_inner_texts()


def test_sorting(page: "sync_api.Page") -> None:
    neurons = _neurons(page)
    ids = _column(neurons, 1)
    assert len(ids) == 100  # of 3,000; a button shows more
    assert ids[0] == str(FIRST_ID)  # it has the most synapses
    header = neurons.locator("th", has_text="neuron").first
    assert header.get_attribute("aria-sort") is None
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert _column(neurons, 1)[:3] == [str(FIRST_ID + i) for i in range(3)]
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert _column(neurons, 1)[0] == str(FIRST_ID + NEURONS - 1)  # all digits are kept


@pytest.mark.parametrize("way", ["ascending", "descending"])
def test_unknown_comes_last_either_way(page: "sync_api.Page", way: str) -> None:
    neurons = _neurons(page)
    header = neurons.locator("th", has_text="known")
    header.locator("button").click()
    if way == "descending":
        header.locator("button").click()
    assert header.get_attribute("aria-sort") == way
    assert set(_column(neurons, 2)) == {"acetylcholine"}
    last = "() => { const t = tables.at(-1); return t.values.known[t.rows.at(-1)]; }"
    assert page.evaluate(last) is None


def test_more_rows_come_as_they_are_wanted(page: "sync_api.Page") -> None:
    neurons = _neurons(page)
    neurons.locator(".more button").click()
    assert len(_column(neurons, 1)) >= 200
    before = neurons.locator("tbody tr").count()
    neurons.locator(".scroll").evaluate("box => box.scrollTo(0, box.scrollHeight)")
    page.wait_for_function(
        "n => document.querySelectorAll('#predictions-neurons ~ section tbody tr')"
        ".length > n",
        arg=before,
    )


def test_filters(page: "sync_api.Page") -> None:
    neurons = _neurons(page)
    count = neurons.locator("output")
    assert count.inner_text() == "3,000 of 3,000 neurons"
    neurons.locator(".filter").fill("alad1")
    assert count.inner_text() == "1,000 of 3,000 neurons"
    neurons.locator(".filter").fill(EVIL)
    assert count.inner_text() == "1,000 of 3,000 neurons"
    neurons.locator(".filter").fill("")
    neurons.locator(".class").select_option("dopamine")
    assert count.inner_text() == "1,000 of 3,000 neurons"
    neurons.locator(".class").select_option("")
    neurons.locator(".least").fill("5")
    assert count.inner_text() == "601 of 3,000 neurons"
    neurons.locator(".least").fill("0")
    neurons.locator(".differs").check()
    assert count.inner_text() == "500 of 3,000 neurons"
    assert all("✗" in text for text in _column(neurons, 3))
    neurons.locator(".differs").uncheck()
    neurons.locator(".unclear").check()
    assert count.inner_text() == "0 of 3,000 neurons"


def test_a_row_opens_to_the_chart_of_its_votes(page: "sync_api.Page") -> None:
    neurons = _neurons(page)
    button = neurons.locator("button.open").first
    assert neurons.locator("tr.detail").count() == 0
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    detail = neurons.locator("tr.detail")
    assert "90 (75.0 %)" in detail.inner_text()
    assert "Uncertain" not in detail.inner_text()
    bars = detail.locator(".bar i").evaluate_all(
        "bars => bars.map(bar => bar.getBoundingClientRect().width)"
    )
    np.testing.assert_allclose(np.array(bars) / bars[0], [1, 20 / 90, 10 / 90], 0.02)
    button.click()
    assert detail.count() == 0
    neurons.locator("button.open").nth(1).click()
    text = detail.inner_text()
    assert "Uncertain: fewer than 100 predicted synapses" in text


def test_names_stay_text(page: "sync_api.Page") -> None:
    assert page.locator("b", has_text="=1+1").count() == 0
    assert EVIL in _column(_neurons(page), 9)


LONG = "\u202e" + "abag" * 100


@pytest.fixture(scope="module")
def long_names_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A report of rows whose names have 401 characters and reverse the direction."""
    folder = tmp_path_factory.mktemp("long")
    table = _table().slice(0, 12)
    for name in ("hemilineage", "cell_type"):
        place = table.schema.get_field_index(name)
        names = pa.array([LONG] * 12, table.schema.field(place).type)
        table = table.set_column(place, name, names)
    files.write_feather(folder / "p.feather", table)
    page = folder / "report.html"
    page.write_text(report.render(None, folder / "p.feather"))
    return page


@pytest.mark.parametrize("javascript", [True, False])
def test_long_names_push_nothing_out(
    browser: "sync_api.Browser", long_names_path: pathlib.Path, javascript: bool
) -> None:
    size = {"width": 1280, "height": 900}
    with browser.new_context(viewport=size, java_script_enabled=javascript) as context:
        page = context.new_page()
        page.goto(long_names_path.as_uri())
        cells = _neurons(page).locator("tbody tr:first-child td.name")
        shown = cells.all_inner_texts()
        assert shown[2:] == ["‹U+202E›" + LONG[1:]] * 2
        rem = 16
        for cell in [*cells.all(), page.locator(".wraps th.name").first]:
            assert cell.bounding_box()["width"] <= 18 * rem + 1
            assert cell.evaluate("x => getComputedStyle(x).unicodeBidi") == "isolate"
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins
        wide = "document.documentElement.scrollWidth <= innerWidth"
        assert page.evaluate(wide)


def test_a_wide_table_hints_that_it_scrolls(page: "sync_api.Page") -> None:
    hint = _neurons(page).locator(".hint")
    assert not hint.is_visible()
    page.set_viewport_size({"width": 390, "height": 800})
    assert hint.is_visible()
    box = _neurons(page).locator(".scroll")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    page.emulate_media(media="print")
    assert not hint.is_visible()


def test_csv_of_the_filtered_rows(page: "sync_api.Page") -> None:
    neurons = _neurons(page)
    neurons.locator(".filter").fill(EVIL)
    neurons.locator(".least").fill("5")
    with page.expect_download() as download:
        neurons.locator(".csv").click()
    text = pathlib.Path(download.value.path()).read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 201
    first = rows[0]
    assert first["neuron_id"] == str(FIRST_ID)
    assert first["hemilineage"] == EVIL
    assert (first["called"], first["rule"]) == ("gaba", "majority")
    counts = [first[f"count_{name}"] for name in CLASSES]
    assert counts == ["90", "20", "10"]
    assert {row["tie"] for row in rows} == {"0"}


def test_a_tie_is_marked(page: "sync_api.Page") -> None:
    made = page.evaluate(
        """() => {
            const neurons = tables.at(-1);
            neurons.values.tie[0] = 1;
            neurons.rows = [0, 1];
            return [neurons.callCell(0), neurons.callCell(1), neurons.detail(0)]
                .map((made) => made.textContent).concat(neurons.csv());
        }"""
    )
    first, second, detail, text = made
    assert first.startswith("gaba (tie)")
    assert "tie" not in second
    assert "several classes have the same highest value" in detail
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["tie"] for row in rows] == ["1", "0"]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@A1", "\t=1", "\r=1"])
def test_csv_cells_are_never_formulas(page: "sync_api.Page", name: str) -> None:
    made = page.evaluate(
        """name => {
            const neurons = tables.at(-1);
            neurons.values.hemilineage.fill(name);
            neurons.rows = [0];
            return neurons.csv();
        }""",
        name,
    )
    [row] = csv.DictReader(io.StringIO(made, newline=""))
    assert row["hemilineage"] == "'" + name


def test_matrix_switches_to_the_share_of_called(page: "sync_api.Page") -> None:
    matrix = page.locator("fieldset.matrix").first
    # The test uses a cell whose two shares differ.
    place = matrix.locator("td").evaluate_all(
        "cells => cells.findIndex(({style}) => "
        "style.getPropertyValue('--r') !== style.getPropertyValue('--c'))"
    )
    cell = matrix.locator("td").nth(place)
    colour = "cell => getComputedStyle(cell).backgroundColor"
    before = cell.inner_text(), cell.evaluate(colour)
    matrix.get_by_label("counts").check()
    assert cell.inner_text().strip().isdigit()
    matrix.get_by_label("share of the called class").check()
    assert "." in cell.inner_text()
    assert (cell.inner_text(), cell.evaluate(colour)) != before


def test_dark_and_printed(page: "sync_api.Page") -> None:
    paper = "() => getComputedStyle(document.body).backgroundColor"
    white = "rgb(255, 255, 255)"
    assert page.evaluate(paper) == white
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) != white
    controls = _neurons(page).locator(".controls")
    assert controls.is_visible()
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(paper) == white
    assert not controls.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(page: "sync_api.Page", scheme: str) -> None:
    """Contrast with the real background is at least 4.5 (WCAG 2, level AA)."""
    page.emulate_media(color_scheme=scheme)
    _neurons(page).locator("button.open").first.click()
    assert page.evaluate(CONTRAST) == []


def test_a_telephone_scrolls_down_only(page: "sync_api.Page") -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    _neurons(page).locator("button.open").first.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_without_javascript(
    browser: "sync_api.Browser", page_path: pathlib.Path
) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(page_path.as_uri())
        neurons = _neurons(page)
        assert neurons.locator("tbody tr").count() == 25
        assert not neurons.locator(".controls").is_visible()
        assert page.locator("svg").first.is_visible()
        assert page.locator("fieldset.matrix td").first.is_visible()
