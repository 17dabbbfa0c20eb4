# SPDX-License-Identifier: Apache-2.0
"""Sends real neurons through all steps that follow the prediction.

The neurons have the 87,403 presynaptic sites of the male nerve cord's ground truth. The
calls of the sites are drawn from the published confusion matrix of the hemibrain
network. The expected results are therefore known within the scatter of the draw.
"""

import csv
import gzip
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from synister_jax import compare, export, one_transmitter
from synister_jax.base import files
from synister_jax.evaluation import confusions, group_calls, metrics, vote_tallies
from synister_jax.exchange import export_files, published
from synister_jax.pages import report
from synister_jax.tables import predictions
from tests.helpers.small_data import shared_data

pytestmark = pytest.mark.long

CLASSES = (
    "gaba",
    "acetylcholine",
    "glutamate",
    "serotonin",
    "octopamine",
    "dopamine",
    "neither",
)
# hb.nt.cmat of natverse/hemibrainr: P(true | called) in percent. Each row is a true
# class.
HEMIBRAIN = """
    80  0  8  2  1  2  9
     9 94 17 16  3 15 73
     9  5 72 11  1  2  7
     0  0  0 45  2  2  2
     0  0  0 21 88  0  3
     2  0  3  5  4 78  7
     0  0  0  0  0  0  0"""
KNOWN = ("acetylcholine", "gaba", "glutamate")
# The intraclass correlation of the drawn calls of one neuron's synapses.
CORRELATION = 0.05


def published_confusion() -> np.ndarray:
    """Returns P(called | true), from the columns above and an assumed P(called)."""
    columns = np.array([line.split() for line in HEMIBRAIN.split("\n")[1:]], float)
    # P(called) is our assumption, in the order of CLASSES.
    often = np.array([0.28, 0.4, 0.28, 0.01, 0.01, 0.01, 0.01])
    joint = columns / columns.sum(axis=0) * often
    return joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Predictions for the real sites, NaN if the neuron's transmitter is unknown."""
    rows: list[list[str]] = []
    folder = shared_data("malevnc_tbars")
    for name in (*KNOWN, "others"):
        with gzip.open(folder / f"{name}.csv.gz", "rt") as file:
            lines = csv.reader(file)
            assert next(lines) == ["body", "x", "y", "z", "conf", "syn_id"]
            rows += [[*line, name] for line in lines]
    body, x, y, z, conf, syn_id, truth = map(np.array, zip(*rows, strict=True))
    assert len(rows) == 87_403
    rng = np.random.default_rng(0)
    neurons, neuron = np.unique(body.astype(np.int64), return_inverse=True)
    confusion = published_confusion()
    called = np.full(len(rows), -1)
    for label in KNOWN:
        own = np.unique(neuron[truth == label])
        mean = confusion[CLASSES.index(label)]
        alphas = np.maximum(mean * (1 / CORRELATION - 1), 1e-6)
        rates = dict(zip(own, rng.dirichlet(alphas, len(own)), strict=True))
        for one in own:
            sites = (neuron == one) & (truth == label)
            called[sites] = rng.choice(len(CLASSES), sites.sum(), p=rates[one])
    values = rng.dirichlet(np.full(len(CLASSES), 0.3), len(rows)).astype(np.float32)
    highest = values.argmax(axis=1)
    at = np.arange(len(rows))
    values[at, highest], values[at, called] = values[at, called], values[at, highest]
    values[called < 0] = np.nan
    table = pa.table(
        {
            "synapse_id": syn_id.astype(np.int64),
            **{
                f"{axis}_nm": place.astype(float) * 8
                for axis, place in (("z", z), ("y", y), ("x", x))
            },
            "neuron_id": neurons[neuron],
            "neurotransmitter": pa.array(truth, mask=truth == "others"),
            **{
                name: pa.nulls(len(rows), pa.string())
                for name in ("hemilineage", "brain_region", "cell_type")
            },
            "cleft_score": conf.astype(np.float32),
        }
    )
    status = np.where(called < 0, "missing_data", "ok")
    path = tmp_path_factory.mktemp("vnc") / "predictions.feather"
    made = predictions.build(table, values, status, CLASSES, {"volume": "male VNC"})
    files.write_feather(path, made)
    return path


@pytest.fixture(scope="module")
def measured(path: pathlib.Path) -> dict:
    measured = metrics.measure(predictions.load(path))
    content = {"classes": list(CLASSES)} | measured
    files.write_json(path.parent / "metrics.json", content)
    return json.loads((path.parent / "metrics.json").read_text())


def test_what_is_measured_is_what_was_drawn(measured: dict) -> None:
    expected = published_confusion()
    found = np.array(measured["synapses"]["confusion_by_row"], float)
    for label in map(CLASSES.index, KNOWN):
        # For 55 neurons and a correlation of 0.05, the standard error is at most
        # √(0.25 · 0.05 / 55) = 0.015.
        np.testing.assert_allclose(found[label], expected[label], atol=0.06)
    assert measured["correlation"]["synapses_within_neurons"] == pytest.approx(
        CORRELATION, abs=0.02
    )
    supports = {n: c["support"] for n, c in measured["neurons"]["per_class"].items()}
    assert [supports[name] for name in KNOWN] == [67, 55, 65]
    assert measured["neurons"]["accuracy"] > 0.97 > measured["synapses"]["accuracy"]
    low, high = measured["synapses"]["interval"]["accuracy"]
    assert low < measured["synapses"]["accuracy"] < high and high - low < 0.1


def test_neurons_under_every_rule(path: pathlib.Path, measured: dict) -> None:
    confusion = confusions.load(path.parent / "metrics.json")
    tally = vote_tallies.of(predictions.open(path), "neuron")
    assert len(tally.groups) == 67 + 55 + 65 + 4
    known = np.array(tally.groups["neurotransmitter"].to_pylist())
    sizes = tally.groups["synapses"].to_numpy()
    for rule in ("majority", "mean_probability", "cleft_weighted", "conf_nt", "banc"):
        table = group_calls.call(tally, rule, confusion)
        called = np.array(table["predicted_neurotransmitter"].to_pylist())
        assert (called[known == None] == None).all()  # noqa: E711 - element by element
        # The summed probabilities of small neurons follow the draw less closely.
        right = (called == known)[(known != None) & (sizes >= 50)]  # noqa: E711
        assert right.mean() > 0.95, rule
    flyem = group_calls.call(tally, "flyem", confusion).to_pylist()
    for neuron in flyem:
        if 0 < neuron["predicted"] < 50:
            assert neuron["predicted_neurotransmitter"] == "unclear"


def test_single_transmitter_neurons_pass_and_mixed_ones_do_not(
    path: pathlib.Path, measured: dict
) -> None:
    confusion = confusions.load(path.parent / "metrics.json")
    model = one_transmitter.model(confusion, "synapses", None)
    _, counts = one_transmitter.units(predictions.open(path), "neuron")
    single = one_transmitter.judge(counts, model, CLASSES, 0.05, 999)
    verdicts = single["verdict"].to_pylist()
    assert verdicts.count("not_predicted") == 4
    assert verdicts.count("several") <= 5  # of 187, at a false discovery rate of 0.05
    # The counts of two neurons with different transmitters are added to imitate a mixed
    # neuron.
    truth = np.array(single["single_neurotransmitter"].to_pylist())
    large = counts.sum(axis=1) >= 300
    pairs = zip(
        counts[large & (truth == "gaba")],
        counts[large & (truth == "acetylcholine")],
        strict=False,
    )
    mixed = np.array([a * 300 // a.sum() + b * 300 // b.sum() for a, b in pairs])
    both = np.concatenate([counts, mixed])
    found = one_transmitter.judge(both, model, CLASSES, 0.05, 999)
    of_mixed = found.slice(len(counts)).to_pylist()
    right = [
        row["verdict"] == "several"
        and {row["first_neurotransmitter"], row["second_neurotransmitter"]}
        == {"gaba", "acetylcholine"}
        for row in of_mixed
    ]
    assert len(right) > 10 and np.mean(right) > 0.7


@pytest.mark.parametrize(
    ("to", "options", "name", "dropped"),
    [
        ("flyem", {"confusion": True}, "tbar-neurotransmitters.feather", ()),
        ("synister", {"predict": 8}, "synapses.feather", ()),
        ("banc", {}, "banc_nt_prediction.parquet", ("neither",)),
        ("fafbseg", {}, "synapses.feather", ("neither",)),
    ],
)
def test_exports_are_read_back_whole(
    path: pathlib.Path,
    measured: dict,
    to: str,
    options: dict,
    name: str,
    dropped: tuple[str, ...],
) -> None:
    if "confusion" in options:
        options = {"confusion": str(path.parent / "metrics.json")}
    if to in ("flyem", "synister"):
        options = options | {"voxel_size_nm_zyx": (8.0, 8.0, 8.0)}
    folder = path.parent / to
    export.export(str(path), to, folder, export_files.ExportOptions(**options), dropped)
    ours, theirs = published.open(path), published.open(folder / name, (8.0, 8.0, 8.0))
    found = compare.compare(ours, theirs, path.parent / f"with-{to}")
    assert found["joined"]["rows"] == 87_403
    assert found["joined"]["predicted"]["only_a"] == 0
    assert found["joined"]["predicted"]["only_b"] == 0
    assert not found["a"]["only_here"]["rows"] and not found["b"]["only_here"]["rows"]
    if not dropped:
        assert found["synapses"]["agreement"] == 1
    for of in found["probabilities"].values():
        assert of["mean_absolute_difference"] < 2e-4  # BANC's file has float16


def test_report_of_real_neurons(path: pathlib.Path) -> None:
    page = report.render(None, path)
    assert "87,403" in page and "missing_data" in page
    ids = predictions.load(path)["neuron_id"].unique().to_pylist()
    # The page holds ids as text, so no digit is lost.
    assert all(f'"{neuron}"' in page for neuron in ids)
