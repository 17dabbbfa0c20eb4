# SPDX-License-Identifier: Apache-2.0
import base64
import hashlib
import pathlib
import re
import shutil
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.network import calibrating
from synister_jax.pages import neurons_table, predictions_section, report, run_section
from synister_jax.tables import predictions, synapses
from synister_jax.training import checkpoint_evaluation
from tests.helpers.html_pages import Page
from tests.helpers.small_data import CLASSES

EVIL = "</script><b>=1+1"


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, short_run: pathlib.Path
) -> pathlib.Path:
    """A run: two checkpoints are evaluated on test, the last is also calibrated."""
    folder = shutil.copytree(
        short_run,
        tmp_path_factory.mktemp("reported") / "run",
        ignore=shutil.ignore_patterns("evaluation"),  # made by other tests
    )
    checkpoint_evaluation.evaluate(folder, "validation", [20])
    checkpoint_evaluation.evaluate(folder, "test", [10, 20])
    calibrating.fit(folder, 20, 0.5)
    calibrating.check(folder, 20, "test")
    return folder


@pytest.fixture(scope="module")
def page_text(run: pathlib.Path) -> str:
    folder = run / "evaluation" / "test" / "step-20"
    return report.render(run, folder / "predictions.feather")


def _predictions(neurons: int, synapses_each: int = 3, **about: object) -> pa.Table:
    """Returns a prediction table, in which one hemilineage has a malicious name."""
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
    assert page.loaded == []  # the page loads no other file
    # The charts are two curves, one of checkpoints, two calibrations, 3 histograms.
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
        "accuracy of neurons has Wilson’s",
        "of 27 synapses right (95 %: ",
        "Accuracy of the checkpoints",
        "Mean probabilities of synapses",
        "precision",
        "Brain regions",
        "wrong calls with the highest probability",
        "Temperature",
        "720575940600000017",  # an id of a test neuron, not rounded
    ):
        assert said in text


def test_only_its_own_script_may_run(page_text: str) -> None:
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page_text)
    script = page_text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.long
def test_an_earlier_evaluation_has_fewer_sections(
    tmp_path: pathlib.Path, run: pathlib.Path
) -> None:
    """Old versions wrote no calibration, no intervals and no counts by class."""
    new = shutil.copytree(run, tmp_path / "new")
    old = shutil.copytree(run, tmp_path / "old")
    shutil.rmtree(old / "calibration")
    for path in old.glob("evaluation/*/step-*/metrics.json"):
        measured = files.read_json(path)
        # After 20 training steps, the correlation may not be defined.
        measured["correlation"]["synapses_within_neurons"] = 0.25
        files.write_json(new / path.relative_to(old), measured)
        kept = {"step", "split", "crops", "part", "classes", "loss"}
        for what in ("synapses", "neurons"):
            names = ("count", "accuracy", "mean_class_accuracy", "confusion")
            measured[what] = {name: measured[what][name] for name in names}
        kept |= {"synapses", "neurons"}
        files.write_json(path, {name: measured[name] for name in kept})
    text, new_text = report.render(old, None), report.render(new, None)
    for section in ("(95 %:", "Brain regions", "Temperature", ">F1<", "Correlat"):
        assert section in new_text
        assert section not in text
    assert "Confusions" in text


def test_predictions_alone(tmp_path: pathlib.Path) -> None:
    table = _predictions(30, temperature=1.5, abstain_below=0.625, step=7)
    page = Page(_render(tmp_path, table))
    text = " ".join(" ".join(page.words).split())
    assert "calibrated: temperature 1.5" in text
    assert "a probability below 0.625 as no call" in text
    assert "90 rows" in text
    assert "outside 12 13.3 %" in text
    assert EVIL in page.words  # as text, not as tags
    [data] = page.data
    assert EVIL in data["words"]["hemilineage"]
    assert data["columns"]["id"][0] == "720575940600000000"
    assert sum(map(sum, data["counts"])) == 90 - 12


def test_rule_stands_beside_its_numbers(tmp_path: pathlib.Path) -> None:
    text = _render(tmp_path, _predictions(6), rule="mean_probability")
    assert "called (mean_probability)" in text
    assert "majority" not in Page(text).words
    assert Page(text).data[0]["rule"] == "mean_probability"


def _with_metrics(run: pathlib.Path, folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """Copies the run; returns path and content of its best metrics.json on test."""
    copy = shutil.copytree(run, folder / "run")
    best = files.read_json(copy / "evaluation/test/summary.json")["best_step"]
    path = copy / f"evaluation/test/step-{best}/metrics.json"
    shutil.rmtree(copy / "evaluation/validation")
    return path, files.read_json(path)


def _text(page_text: str) -> str:
    return " ".join(" ".join(Page(page_text).words).split())


@pytest.mark.long
def test_intervals_that_say_nothing_are_not_shown(
    tmp_path: pathlib.Path, run: pathlib.Path
) -> None:
    path, measured = _with_metrics(run, tmp_path)
    measured["synapses"]["interval"] = {
        "accuracy": [0.25, 0.75],
        "mean_class_accuracy": None,
        "macro_f1": None,
    }
    measured["neurons"]["interval"] = dict.fromkeys(measured["synapses"]["interval"])
    files.write_json(path, measured)
    text = _text(report.render(tmp_path / "run", None))
    assert text.count("(95 %: 25.0 to 75.0 %)") == 1
    assert text.count("(95 %: ") == 2  # at the number and in the note
    assert "accuracy of neurons has Wilson’s interval. All other" in text
    assert "None" not in text.partition("Configuration")[0]
    measured["synapses"]["interval"]["accuracy"] = None
    files.write_json(path, measured)
    assert "(95 %: " not in _text(report.render(tmp_path / "run", None))


@pytest.mark.long
def test_without_shards_there_are_no_crops(
    tmp_path: pathlib.Path, run: pathlib.Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = files.read_json(copy / "config.json")
    moved = pathlib.Path(config["shards"])
    files.write_json(copy / "config.json", config | {"shards": str(tmp_path / "no")})
    page = report.render(copy, None)
    text = _text(page)
    assert f"shards {tmp_path}/no are not there" in text
    assert "Crops and calls" not in text
    assert "of 27 synapses right" in text
    assert Page(page).pictures == []
    given = report.render(copy, None, shards=moved)
    assert "Crops and calls" in given and Page(given).pictures
    with pytest.raises(UserError, match="gone are not there"):
        report.render(copy, None, shards=tmp_path / "gone")
    with pytest.raises(UserError, match="--shards has no effect without --workdir"):
        report.render(None, tmp_path / "p.feather", shards=moved)


def _without(name: str) -> Callable[[pathlib.Path], None]:
    def damage(path: pathlib.Path) -> None:
        content = files.read_json(path)
        del content[name]
        files.write_json(path, content)

    return damage


def _cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("test/summary.json", _without("checkpoints")),
        ("test/summary.json", lambda path: path.write_text("[]")),
        ("test/summary.json", lambda path: path.write_text('{"best_step": 1}')),
        ("validation/step-20/metrics.json", pathlib.Path.unlink),
        ("validation/step-20/metrics.json", _cut),
        ("validation/step-20/metrics.json", _without("synapses")),
        ("validation/step-20/predictions.feather", pathlib.Path.unlink),
        ("validation/step-20/predictions.feather", _cut),
    ],
)
def test_damaged_evaluations_say_what_to_run_again(
    tmp_path: pathlib.Path,
    run: pathlib.Path,
    name: str,
    damage: Callable[[pathlib.Path], None],
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    damage(copy / "evaluation" / name)
    part = name.partition("/")[0]
    with pytest.raises(UserError) as raised:
        report.render(copy, None)
    said = str(raised.value)
    assert str(copy / "evaluation" / name) in said
    assert f"`python -m synister_jax.evaluate --workdir={copy} --part={part}" in said
    assert "\n" not in said


def test_a_damaged_calibration_says_what_to_run_again(
    tmp_path: pathlib.Path, run: pathlib.Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    _without("curve")(copy / "calibration/step-20.json")
    again = f"calibrate --workdir={copy} --steps=20`"
    with pytest.raises(UserError, match=again):
        report.render(copy, None)


@pytest.mark.long
def test_contact_sheet_has_the_surest_and_the_least_sure_first(
    tmp_path: pathlib.Path, run: pathlib.Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "evaluation/test/step-20/predictions.feather"
    files.write_json(
        path.parents[1] / "summary.json",
        files.read_json(path.parents[1] / "summary.json") | {"best_step": 20},
    )
    table = predictions.load(path)
    classes = predictions.classes(table)
    truth = synapses.labels(table, classes)
    rows = np.flatnonzero(truth == 0)
    assert len(rows) >= 6
    # (class, next class): the smallest margins do not have the lowest probabilities.
    pairs = [(0.9, 0.1), (0.48, 0.47), (0.4, 0.35), (0.5, 0.48), (0.6, 0.2), (0.3, 0.4)]
    probability = predictions.probabilities(table).copy()
    probability[rows] = [1, 0, 0]
    for row, (first, second) in zip(rows, pairs, strict=False):
        probability[row] = (first, second, 1 - first - second)
    status = table["status"].to_pylist()
    known = table.select([n for n in table.column_names if n in synapses.SCHEMA.names])
    about = predictions.about(table)
    built = predictions.build(known, probability, status, classes, about)
    files.write_feather(path, built)
    [part] = [p for p in run_section.content(copy)["parts"] if p["name"] == "test"]
    (of_class, kinds), *_ = part["sheet"]
    assert of_class.name == classes[0]
    ids = table["synapse_id"].to_numpy()[rows]
    shown = {kind: [tile["id"] for tile in tiles] for kind, tiles in kinds}
    # The margins are 0.01, 0.02, 0.05 (right calls) and 0.1 (the wrong call).
    least_sure = ids[[1, 3, 2, 5]].tolist()
    assert shown["calls with the smallest margin"] == least_sure
    assert shown["right calls with the highest probability"] == [*ids[6:], ids[0]][:4]
    assert shown["wrong calls with the highest probability"] == [ids[5]]


def test_share_of_sure_calls(tmp_path: pathlib.Path) -> None:
    """A probability of exactly 0.9 counts as sure."""
    top = [0.9, 0.95, 0.899, 0.5]
    probability = np.array([[p, 1 - p, 0] for p in top], np.float32)
    table = _predictions(4, 1)
    known = table.select([n for n in table.column_names if n in synapses.SCHEMA.names])
    built = predictions.build(known, probability, ["ok"] * 4, CLASSES, {})
    text = _text(_render(tmp_path, built))
    assert f"{CLASSES[0]}: 4 0 50.0 % ≥ 0.9 1" in text


def test_ties_are_marked(tmp_path: pathlib.Path) -> None:
    called = np.array([0, 1, 0, 1, 2, 2, 2, 1])  # neuron 0: 2:2, neuron 1: 3:1
    probability = np.full((8, 3), 0.1, np.float32)
    probability[np.arange(8), called] = 0.8
    table = _predictions(8, 1)
    known = table.select([n for n in table.column_names if n in synapses.SCHEMA.names])
    place = known.schema.get_field_index("neuron_id")
    neuron = pa.array(np.repeat([5, 6], 4), pa.int64())
    known = known.set_column(place, "neuron_id", neuron)
    built = predictions.build(known, probability, ["ok"] * 8, CLASSES, {})
    page = _render(tmp_path, built)
    [data] = Page(page).data
    assert dict(zip(data["columns"]["id"], data["columns"]["tie"], strict=True)) == {
        "5": 1,
        "6": 0,
    }
    text = _text(page)
    assert f"{CLASSES[0]} (tie)" in text
    assert f"{CLASSES[2]} (tie)" not in text
    assert "have the same highest value (tie)" in text


def test_invisible_characters_in_names_are_spelled_out(tmp_path: pathlib.Path) -> None:
    table = _predictions(3)
    place = table.schema.get_field_index("hemilineage")
    names = pa.array(["\u202eabag"] * len(table), table.schema.field(place).type)
    page = _render(tmp_path, table.set_column(place, "hemilineage", names))
    assert "\u202e" not in page
    assert "‹U+202E›abag" in Page(page).words
    assert Page(page).data[0]["words"]["hemilineage"] == ["\u202eabag"]  # for the CSV


def test_neurons_that_are_not_in_the_page_are_counted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neurons_table, "MOST", 20)
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
    text = _render(tmp_path, table)
    page = Page(text)
    assert page.data == []
    assert "Hemilineages" not in page.words
    assert "No row names a neuron (column neuron_id)" in _text(text)


def test_predictions_without_rows(tmp_path: pathlib.Path) -> None:
    text = _text(_render(tmp_path, _predictions(4).slice(0, 0)))
    assert "The table has no rows, so there is no table of neurons." in text


def test_counts_do_not_depend_on_the_pieces() -> None:
    table = _predictions(40)
    whole = predictions_section.Counter(CLASSES)
    whole.add(table)
    pieces = predictions_section.Counter(CLASSES)
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
    known = neurons_table.legend(synapses.CLASSES)
    assert [c.colour for c in known] == list(range(10))
    [gaba, other, new] = neurons_table.legend(["gaba", "dopamine", "proctolin"])
    assert (gaba.colour, other.colour) == (0, 5)
    assert new.colour not in (0, 5)


def test_neither_run_nor_predictions(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="give --workdir, --predictions or both"):
        report.render(None, None)
    (tmp_path / "p.feather").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read predictions"):
        report.render(None, tmp_path / "p.feather")
