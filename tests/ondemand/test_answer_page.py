# SPDX-License-Identifier: Apache-2.0
import base64
import hashlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from synister_jax.base.errors import UserError
from synister_jax.ondemand import answer_page
from synister_jax.pages import neurons_table
from tests.helpers import html_pages
from tests.helpers.html_pages import Page
from tests.helpers.prediction_tables import NEURON, SIX, make, write

if TYPE_CHECKING:
    from playwright import sync_api

EVIL = "</script><b>=1+1"
TURNED = "\u202eabag"


def _about(asked: int, rows: int, kind: str = "neurons", **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "source": "hemibrain",
        "source_title": "Hemibrain, neuPrint",
        "asked_of": {"dataset": "hemibrain:v1.2.1"},
        "asked": asked,
        "unknown_neurons": [],
        "neurons_without_synapses": [],
        "rows": rows,
        "status": {"ok": rows},
        "classes": list(SIX),
        "model": {"workdir": "hemi", "step": 417_000},
        "volume": "https://someone:secret@host/hemibrain",
        "temperature": None,
        "warnings": [],
        "written_by": "synister_jax 0.1.0",
        **more,
    }


def _render(
    folder: pathlib.Path,
    neurons: Sequence[int | None],
    calls: Sequence[str | None],
    classes: Sequence[str] = SIX,
    **about: Any,
) -> str:
    write(folder, make(neurons, calls, classes))
    about = {"asked": len({*neurons} - {None})} | about
    return answer_page.render(folder, _about(rows=len(neurons), **about))


def _text(page: str) -> str:
    return " ".join(" ".join(Page(page).words).split())


def _cards(page: str) -> dict[str, str]:
    """Returns the id and the text of every card, in the order of the page."""
    cards = re.findall(r'<section class="card".*?</section>', page, re.DOTALL)
    words = [_text(card) for card in cards]
    return {text.partition(" ")[0]: text.partition(" ")[2] for text in words}


# In the order of the request, the neurons have a clear majority, few synapses, no
# majority, a tie, and no predicted synapse.
_SIZES = {
    NEURON + 5: [("gaba", 90), ("dopamine", 30)],
    NEURON + 1: [("octopamine", 3)],
    NEURON + 9: [("serotonin", 80), ("gaba", 50), ("glutamate", 50)],
    NEURON: [("gaba", 2), ("dopamine", 2)],
    NEURON + 3: [(None, 7)],
}


def _five() -> tuple[list[int | None], list[str | None]]:
    neurons, calls = [], []
    for neuron, parts in _SIZES.items():
        for name, count in parts:
            neurons += [neuron] * count
            calls += [name] * count
    return neurons, calls


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    neurons, calls = _five()
    return _render(
        tmp_path_factory.mktemp("answer"),
        [*neurons, None],
        [*calls, "gaba"],
        status={"ok": 308, "outside": 7},
        unknown_neurons=["17", "720575940600000099"],
        neurons_without_synapses=["18"],
        warnings=["half of them are outside"],
        temperature=1.25,
    )


def test_page_says_what_was_asked_and_answered(page_text: str) -> None:
    page = Page(page_text)
    assert page.loaded == []
    assert len(set(page.ids)) == len(page.ids)
    headings = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings == [1, 2, *[3] * 5, 2]
    text = _text(page_text)
    for said in (
        "The request asks for 5 neurons.",
        "Hemibrain, neuPrint; neurons are given by body id",
        "315 synapses; predictions.csv has one row for each, "
        "in the order of the request",
        "hemi , checkpoint of step 417000",
        "https://…@host/hemibrain",
        "in the answer: nm in the volume frame",
        "calibrated: temperature 1.25",
        "Warning: half of them are outside",
        "Neurons not known to Hemibrain, neuPrint (2): 17, 720575940600000099.",
        "Known neurons without presynaptic sites (1): 18.",
        "ok 308 97.8 % outside 7 2.2 %",
        "Neurons, in the order of the request",
        "1 row names no neuron: only predictions.csv contains this row.",
    ):
        assert said in text
    assert "secret" not in page_text


def test_neurons_are_in_the_order_asked(page_text: str) -> None:
    cards = _cards(page_text)
    assert list(cards) == [str(neuron) for neuron in _SIZES]
    sure, few, none_above_half, tie, nothing = cards.values()
    assert sure.startswith("gaba gaba 90 (75.0 %) acetylcholine 0 glutamate 0")
    assert sure.endswith("dopamine 30 (25.0 %) 120 of 120 synapses predicted.")
    assert few.startswith("octopamine uncertain gaba 0")
    assert few.endswith("3 of 3 synapses predicted: fewer than 100 predicted synapses.")
    assert none_above_half.startswith("serotonin uncertain ")
    assert none_above_half.endswith(
        "predicted: no class has more than half of the predicted synapses."
    )
    assert tie.startswith("gaba , dopamine (tie) uncertain ")
    assert tie.endswith(
        "predicted synapses, no class has more than half of the predicted synapses."
    )
    assert nothing.startswith("not predicted gaba 0 ")
    assert nothing.endswith("0 of 7 synapses predicted.")
    label = f'role="img" aria-label="neuron {NEURON + 5}: gaba 90, acetylcholine 0, '
    assert label in page_text


def test_table_has_all_neurons_and_nothing_known(page_text: str) -> None:
    [data] = Page(page_text).data
    assert data["columns"]["id"][0] == str(NEURON + 9)  # with most predictions
    assert len(data["counts"]) == 5
    table = page_text.partition('aria-label="table of neurons"')[2]
    assert 'data-by="called"' in table
    assert "known" not in table.partition("</table>")[0]
    # The filter for calls that differ from the known class is hidden.
    assert " hidden><input type=" in page_text


def test_only_its_own_script_may_run(page_text: str) -> None:
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page_text)
    script = page_text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([51, 49, 0], 0),
        ([50, 50, 0], 1),
        ([99, 0, 0], 1),
        ([40, 40, 10], 2),
        ([0, 0, 0], 2),
    ],
)
def test_doubts(counts: list[int], expected: int) -> None:
    assert len(neurons_table.doubts(counts)) == expected


def test_more_neurons_than_charts(tmp_path: pathlib.Path) -> None:
    ids = [NEURON + (i * 37) % 101 for i in range(101)]
    page = _render(tmp_path, ids, ["gaba"] * 101)
    assert list(_cards(page)) == [str(i) for i in ids[: answer_page.MOST_CHARTS]]
    assert "The first 60 of 101 neurons, in the order of the request" in _text(page)
    assert len(Page(page).data[0]["counts"]) == 101


def test_many_unknown_neurons_are_counted(tmp_path: pathlib.Path) -> None:
    unknown = [str(i) for i in range(1000, 2250)]
    text = _text(_render(tmp_path, [1], ["gaba"], unknown_neurons=unknown))
    assert "(1,250): 1000, 1001" in text
    assert ", 1199 and 1,050 more, which answer.json lists." in text


def test_positions_without_neurons(tmp_path: pathlib.Path) -> None:
    rows = 230
    calls = [None if i % 10 == 3 else SIX[i % 2] for i in range(rows)]
    options = {"kind": "positions", "asked": rows}
    page = _render(tmp_path, [None] * rows, calls, **options)
    text = _text(page)
    assert Page(page).data == []
    assert "Hemibrain, neuPrint; positions are given in voxels of 8 nm" in text
    assert "gaba 115 (55.6 %) acetylcholine 92 (44.4 %) glutamate 0" in text
    assert "207 of 230 positions predicted." in text
    assert "The first 200 of 230 positions" in text
    body = page.rpartition("<tbody>")[2].partition("</tbody>")[0]
    shown = [_text(row).split() for row in body.split("</tr>")[:-1]]
    assert len(shown) == answer_page.MOST_POSITIONS
    first = 9_007_199_254_740_993
    assert shown[0][:2] == [str(first), "gaba"]
    assert shown[0][3:] == ["ok", "0", "0", "0"]
    assert 0.5 < float(shown[0][2]) <= 1
    assert shown[3] == [str(first + 3), "–", "–", "outside", "36", "24", "120"]
    assert shown[199][-3:] == ["2,388", "1,592", "7,960"]


def test_few_positions_are_all_there(tmp_path: pathlib.Path) -> None:
    page = _render(tmp_path, [None], ["gaba"], kind="positions", asked=1)
    text = _text(page)
    assert "The request asks for 1 position." in text
    assert "position called probability status" in text
    assert "1 of 1 position predicted." in text
    assert "The first" not in text and "All positions are in" not in text


def test_nothing_to_predict(tmp_path: pathlib.Path) -> None:
    options = {"unknown_neurons": ["5"], "status": {}, "asked": 1}
    text = _text(_render(tmp_path, [], [], **options))
    assert "(1): 5. There is no synapse to predict" in text
    assert "Neurons, in" not in text


def test_names_from_anywhere_stay_text(tmp_path: pathlib.Path) -> None:
    classes = [EVIL, TURNED]
    options = {
        "classes": classes,
        "model": {"workdir": EVIL, "step": 1},
        "warnings": [EVIL, TURNED],
        "source_title": TURNED,
        "unknown_neurons": ["5"],
    }
    for neuron in (NEURON, None):
        page = _render(tmp_path, [neuron] * 3, [EVIL, EVIL, TURNED], **options)
        assert "<b>=1" not in page
        assert "\u202e" not in page
        assert EVIL in Page(page).words
        assert "‹U+202E›abag" in _text(page)


def test_predictions_that_are_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="cannot read predictions"):
        answer_page.render(tmp_path, _about(1, 1))


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory, page_text: str) -> pathlib.Path:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    path.write_text(page_text)
    return path


@pytest.fixture
def page(
    browser: "sync_api.Browser", page_path: pathlib.Path
) -> Iterator["sync_api.Page"]:
    with html_pages.opened(browser, page_path) as page:
        yield page


_FITS = "document.documentElement.scrollWidth <= innerWidth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_can_be_read(page: "sync_api.Page", width: int, scheme: str) -> None:
    """Contrast is at least 4.5 (WCAG 2, level AA), and nothing is beyond the edge."""
    from tests.helpers.html_pages import CONTRAST

    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.locator("button.open").first.click()
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(_FITS)


def test_bars_are_shares(page: "sync_api.Page") -> None:
    card = page.locator(".card").first
    widths = card.locator(".bar").evaluate_all(
        "bars => bars.map(bar => bar.firstChild.getBoundingClientRect().width"
        " / bar.clientWidth)"
    )
    assert widths == pytest.approx([0.75, 0, 0, 0, 0, 0.25], abs=0.01)
    colours = card.locator(".bar i").evaluate_all(
        "bars => bars.map(bar => getComputedStyle(bar).backgroundColor)"
    )
    of_legend = page.locator(".legend i").evaluate_all(
        "found => found.map(each => getComputedStyle(each).backgroundColor)"
    )
    assert colours == of_legend
    assert len({*colours}) == len(SIX)


def test_table_is_sorted_and_searched(page: "sync_api.Page") -> None:
    section = page.locator("section.neurons")
    ids = section.locator("tbody td:first-child")
    assert ids.all_inner_texts()[0] == str(NEURON + 9)
    section.locator("th button", has_text="neuron").click()
    assert ids.all_inner_texts() == [str(neuron) for neuron in sorted(_SIZES)]
    section.get_by_label("Find id or class").fill("octo")
    assert section.locator("output").inner_text() == "1 of 5 neurons"
    assert not section.locator(".differs").is_visible()
    rows = section.locator("tbody tr")
    assert rows.locator("td").count() == section.locator("thead th").count()
    with page.expect_download() as download:
        section.locator(".csv").click()
    text = pathlib.Path(download.value.path()).read_text()
    assert f"\n{NEURON + 1},,octopamine," in text


@pytest.mark.long
def test_long_names_push_nothing_out(
    browser: "sync_api.Browser", tmp_path: pathlib.Path
) -> None:
    long, wide = "ab" * 200, "a b " * 100
    options = {"classes": [long, wide], "warnings": [long], "source_title": long}
    for neuron in (NEURON, None):
        page_text = _render(tmp_path, [neuron] * 2, [long, wide], **options)
        (tmp_path / "page.html").write_text(page_text)
        with browser.new_context(viewport={"width": 390, "height": 800}) as context:
            page = context.new_page()
            page.goto((tmp_path / "page.html").as_uri())
            assert page.evaluate(_FITS)
            card = page.locator(".card").first
            assert card.evaluate("card => card.scrollWidth <= card.clientWidth")
            page.emulate_media(media="print")
            page.set_viewport_size({"width": 718, "height": 1000})
            assert page.evaluate(_FITS)


@pytest.mark.long
def test_printed_and_without_javascript(
    browser: "sync_api.Browser", page_path: pathlib.Path
) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(page_path.as_uri())
        assert page.locator(".card").count() == len(_SIZES)
        assert page.locator(".card .bar").first.is_visible()
        assert page.locator("section.neurons tbody tr").count() == len(_SIZES)
        assert not page.locator(".controls").is_visible()
        page.emulate_media(media="print", color_scheme="dark")
        paper = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(paper) == "rgb(255, 255, 255)"
