# SPDX-License-Identifier: Apache-2.0
import base64
import hashlib
import html.parser
import json
import pathlib
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from conftest import CLASSES

from synister_jax import (
    calibrate,
    evaluate,
    files,
    predictions,
    report,
    report_neurons,
    report_predictions,
    synapses,
)
from synister_jax.command import UserError

EVIL = "</script><b>=1+1"


class Page(html.parser.HTMLParser):
    """Headings, pictures, table rows, and what a page would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[bytes] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.unlabelled = 0
        self.data: list[dict] = []
        self.words: list[str] = []
        self._is_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self._is_data = attributes.get("type") == "application/json"
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
            return
        source = attributes.get("src") or attributes.get("href") or ""
        if source.startswith("data:image/png;base64,"):
            self.pictures.append(base64.b64decode(source.partition(",")[2]))
            self.unlabelled += not attributes.get("alt")
        elif (source and tag not in ("use",)) or tag in ("link", "iframe"):
            self.loaded.append(tag)

    def handle_data(self, data: str) -> None:
        if self._is_data:
            self.data.append(json.loads(data))
        self._is_data = False
        self.words.append(data)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, short_run: pathlib.Path
) -> pathlib.Path:
    """Two checkpoints evaluated on test, the last calibrated on validation."""
    folder = shutil.copytree(short_run, tmp_path_factory.mktemp("reported") / "run")
    evaluate.evaluate(folder, "validation", [20])
    evaluate.evaluate(folder, "test", [10, 20])
    calibrate.fit(folder, 20, 0.5)
    calibrate.check(folder, 20, "test")
    return folder


@pytest.fixture(scope="module")
def page_text(run: pathlib.Path) -> str:
    folder = run / "evaluation" / "test" / "step-20"
    return report.render(run, folder / "predictions.feather")


def _predictions(neurons: int, synapses_each: int = 3, **about: object) -> pa.Table:
    """A prediction table of our own making, hemilineage 0 with an evil name."""
    rng = np.random.default_rng(0)
    rows = neurons * synapses_each
    neuron = np.arange(rows) % neurons
    probability = rng.dirichlet(np.full(3, 0.3), rows).astype(np.float32)
    status = np.where(np.arange(rows) % 7 == 6, "outside", "ok")
    probability[status == "outside"] = np.nan
    lineage = np.array([EVIL, "ALAD1", "DM1"])[neuron % 3]
    table = synapses.conform(
        pa.table(
            {
                "synapse_id": np.arange(rows),
                **dict.fromkeys(synapses.POSITION, np.zeros(rows)),
                "neuron_id": 720_575_940_600_000_000 + neuron,
                "neurotransmitter": [CLASSES[n % 3] if n % 2 else None for n in neuron],
                "hemilineage": lineage,
            }
        ),
        "table",
    )
    return predictions.build(table, probability, status.tolist(), CLASSES, about)


def _render(folder: pathlib.Path, table: pa.Table, **options: object) -> str:
    files.write_feather(folder / "p.feather", table)
    return report.render(None, folder / "p.feather", **options)


def test_page_of_a_run_and_its_predictions(page_text: str) -> None:
    page = Page(page_text)
    assert page.loaded == []  # self-contained
    # Two curves, accuracy of two checkpoints, two calibrations, three histograms.
    assert page.tags.count("svg") == 8
    assert page.pictures and all(p.startswith(b"\x89PNG") for p in page.pictures)
    assert page.unlabelled == 0
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    headings = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(headings, headings[1:], strict=False))
    text = " ".join(page.words)
    for said in (
        "intervals bootstrapped over neurons",
        "of 27 synapses right (95 %: ",
        "Accuracy against checkpoints",
        "Mean probabilities of synapses",
        "precision",
        "Brain regions",
        "most confident of the wrong",
        "Temperature",
        "720575940600000017",  # a neuron of the test part, not rounded
    ):
        assert said in text


def test_only_its_own_script_may_run(page_text: str) -> None:
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page_text)
    script = page_text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_an_earlier_evaluation_has_fewer_sections(
    tmp_path: pathlib.Path, run: pathlib.Path, page_text: str
) -> None:
    """Before calibration, intervals and counts by class were written."""
    old = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(old / "calibration")
    for path in old.glob("evaluation/*/step-*/metrics.json"):
        measured = files.read_json(path)
        kept = {"step", "split", "crops", "part", "classes", "loss"}
        for what in ("synapses", "neurons"):
            names = ("count", "accuracy", "mean_class_accuracy", "confusion")
            measured[what] = {name: measured[what][name] for name in names}
        kept |= {"synapses", "neurons"}
        files.write_json(path, {name: measured[name] for name in kept})
    text = report.render(old, None)
    for section in ("(95 %:", "Brain regions", "Temperature", ">F1<", "Correlat"):
        assert section in page_text
        assert section not in text
    assert "Confusions" in text


def test_predictions_alone(tmp_path: pathlib.Path) -> None:
    table = _predictions(30, temperature=1.5, abstain_below=0.625, step=7)
    page = Page(_render(tmp_path, table))
    text = " ".join(" ".join(page.words).split())
    assert "calibrated: temperature 1.5" in text
    assert "below 0.625 is to be taken as no call" in text
    assert "90 rows" in text
    assert "outside 12 13.3 %" in text
    assert EVIL in page.words  # text, not tags
    [data] = page.data
    assert EVIL in data["words"]["hemilineage"]
    assert data["columns"]["id"][0] == "720575940600000000"
    assert sum(map(sum, data["counts"])) == 90 - 12


def test_rule_stands_beside_its_numbers(tmp_path: pathlib.Path) -> None:
    text = _render(tmp_path, _predictions(6), rule="mean_probability")
    assert "called (mean_probability)" in text
    assert "majority" not in Page(text).words
    assert Page(text).data[0]["rule"] == "mean_probability"


def test_neurons_that_are_not_in_the_page_are_counted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_neurons, "MOST", 20)
    page = Page(_render(tmp_path, _predictions(50)))
    text = " ".join(" ".join(page.words).split())
    assert "the 20 neurons with the most predicted synapses, of 50." in text
    [data] = page.data
    assert len(data["columns"]["id"]) == len(data["counts"]) == 20
    assert min(data["columns"]["predicted"]) == 3  # 14 of the 50 have fewer


def test_predictions_without_neurons_and_hemilineages(tmp_path: pathlib.Path) -> None:
    table = _predictions(4)
    for name in ("neuron_id", "hemilineage"):
        place = table.schema.get_field_index(name)
        empty = pa.nulls(len(table), table.schema.field(name).type)
        table = table.set_column(place, name, empty)
    page = Page(_render(tmp_path, table))
    assert page.data == []
    assert "Hemilineages" not in page.words


def test_counts_do_not_depend_on_the_pieces() -> None:
    table = _predictions(40)
    whole = report_predictions.Counter(CLASSES)
    whole.add(table)
    pieces = report_predictions.Counter(CLASSES)
    for start in range(0, len(table), 17):
        pieces.add(table.slice(start, 17))
    called = predictions.called(table)
    assert whole.top.sum() == (called >= 0).sum()
    np.testing.assert_array_equal(
        whole.top.sum(axis=1), np.bincount(called[called >= 0])
    )
    np.testing.assert_array_equal(whole.top, pieces.top)
    np.testing.assert_array_equal(whole.sure, pieces.sure)
    assert whole.status == pieces.status == {"ok": 103, "outside": 17}
    for name in (EVIL, "ALAD1", "DM1"):
        np.testing.assert_array_equal(
            whole.hemilineages[name], pieces.hemilineages[name]
        )


def test_each_class_has_a_colour_of_its_own() -> None:
    known = report_neurons.legend(synapses.CLASSES)
    assert [c.colour for c in known] == list(range(10))
    [gaba, other, new] = report_neurons.legend(["gaba", "dopamine", "proctolin"])
    assert (gaba.colour, other.colour) == (0, 5)
    assert new.colour not in (0, 5)


def test_neither_run_nor_predictions(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="give --workdir, --predictions or both"):
        report.render(None, None)
    (tmp_path / "p.feather").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read predictions"):
        report.render(None, tmp_path / "p.feather")
