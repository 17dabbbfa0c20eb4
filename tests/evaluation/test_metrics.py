# SPDX-License-Identifier: Apache-2.0
"""Compares all numbers with scikit-learn on random tables; edge cases by hand."""

import json

import numpy as np
import pyarrow as pa
import pytest
import sklearn.metrics

from synister_jax.evaluation import metrics
from synister_jax.tables import predictions, synapses
from tests.helpers.prediction_tables import drawn, table_of
from tests.helpers.small_data import CLASSES

NAN = [np.nan] * 3


def assert_as_scikit_learn(found: dict, truth: np.ndarray, called: np.ndarray) -> None:
    labels = range(len(CLASSES))
    confusion = sklearn.metrics.confusion_matrix(truth, called, labels=labels)
    assert found["confusion"] == confusion.tolist()
    assert found["count"] == len(truth)
    assert found["accuracy"] == pytest.approx(
        sklearn.metrics.accuracy_score(truth, called)
    )
    occurring = np.unique(truth)
    recalls = sklearn.metrics.recall_score(
        truth, called, labels=occurring, average="macro", zero_division=0
    )
    assert found["mean_class_accuracy"] == pytest.approx(recalls)
    if "macro_f1" not in found:
        return
    f1 = sklearn.metrics.f1_score(
        truth, called, labels=occurring, average="macro", zero_division=0
    )
    assert found["macro_f1"] == pytest.approx(f1)
    numbers = sklearn.metrics.precision_recall_fscore_support(
        truth, called, labels=labels, zero_division=np.nan
    )
    for label, name in enumerate(CLASSES):
        own = found["per_class"][name]
        assert own["support"] == numbers[3][label]
        assert own["called"] == (called == label).sum()
        for key, values in zip(("precision", "recall", "f1"), numbers, strict=False):
            if own[key] is None:
                assert np.isnan(values[label]) or not own["support"]
            else:
                assert own[key] == pytest.approx(values[label])
    for key, way in (("confusion_by_row", "true"), ("confusion_by_column", "pred")):
        expected = sklearn.metrics.confusion_matrix(
            truth, called, labels=labels, normalize=way
        )
        given = np.array(found[key], float)  # None becomes NaN
        np.testing.assert_allclose(np.nan_to_num(given), expected)


def majority(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Returns truth, call, and votes for each class of each group, in plain Python."""
    called = predictions.called(table)
    groups: dict = {}
    for row, call in zip(table.to_pylist(), called, strict=True):
        if row[column] is None:
            continue
        known, votes = groups.setdefault(row[column], (set(), [0] * 3))
        known |= {row["neurotransmitter"]} - {None}
        if call >= 0:
            votes[call] += 1
    kept = {
        name: (CLASSES.index(*known), votes.index(max(votes)), votes)
        for name, (known, votes) in groups.items()
        if len(known) == 1 and any(votes)
    }
    truth, call, votes = zip(*kept.values(), strict=True)
    return np.array(truth), np.array(call), dict(zip(kept, votes, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_scikit_learn(seed: int) -> None:
    table = drawn(600, neurons=40, seed=seed)
    measured = metrics.measure(table)
    json.dumps(measured, allow_nan=False)
    truth, called = synapses.labels(table, CLASSES), predictions.called(table)
    known = (truth >= 0) & (called >= 0)
    assert_as_scikit_learn(measured["synapses"], truth[known], called[known])
    probabilities = predictions.probabilities(table)
    one_hot = np.eye(3)[truth[known]]
    values = probabilities[known].astype(np.float64)
    likelihood = np.maximum((values * one_hot).sum(axis=1), 1e-38)
    assert measured["loss"] == pytest.approx(-np.log(likelihood).mean(), rel=1e-5)
    for name, column in (("neurons", "neuron_id"), ("cell_types", "cell_type")):
        found = measured[name]
        if not found["count"]:
            assert column == "cell_type"  # each type has several transmitters
            continue
        assert_as_scikit_learn(found, *majority(table, column)[:2])
    for name, found in measured["brain_regions"].items():
        here = known & np.array([r == name for r in table["brain_region"].to_pylist()])
        assert_as_scikit_learn(found, truth[here], called[here])
    expected = [values[truth[known] == t].mean(axis=0) for t in range(3)]
    np.testing.assert_allclose(measured["expected_probability"], expected, rtol=1e-6)


def test_variants_keep_large_and_sure_neurons_and_their_synapses() -> None:
    table = drawn(600, neurons=60, seed=5)
    truth, called = synapses.labels(table, CLASSES), predictions.called(table)
    neuron_truth, neuron_call, votes = majority(table, "neuron_id")
    size = np.array([sum(v) for v in votes.values()])
    share = np.array([max(v) / sum(v) for v in votes.values()])
    every = metrics.measure(table, (1, 9, 10**6), (0.0, 0.6))["neuron_variants"]
    assert [(v["n_min"], v["cutoff"]) for v in every] == [
        (n, c) for n in (1, 9, 10**6) for c in (0.0, 0.6)
    ]
    for found in every:
        kept = (size >= found["n_min"]) & (share >= found["cutoff"])
        if not kept.any():
            assert found["count"] == 0 and found["accuracy"] is None
            continue
        assert_as_scikit_learn(found, neuron_truth[kept], neuron_call[kept])
    # The first variant keeps every neuron with a prediction, even if its transmitter
    # is unknown.
    first = every[0]["synapses"]
    neurons = table["neuron_id"].to_pylist()
    seen = {n for n, c in zip(neurons, called, strict=True) if c >= 0} - {None}
    rows = np.array([n in seen for n in neurons]) & (truth >= 0) & (called >= 0)
    assert_as_scikit_learn(first, truth[rows], called[rows])


def test_accuracy_against_the_number_of_synapses() -> None:
    one, two = [[0.8, 0.1, 0.1]], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]
    seven = [[0.1, 0.1, 0.8]] * 7
    table = table_of(
        [*one, *two, *seven, NAN],
        {
            "neuron_id": [1, 2, 2, *[3] * 7, 4],
            "neurotransmitter": ["gaba", *["acetylcholine"] * 2, *["dopamine"] * 7]
            + ["gaba"],
        },
    )
    assert metrics.measure(table)["accuracy_by_synapses"] == [
        {"synapses": [1, 1], "neurons": 1, "accuracy": 1.0},
        {"synapses": [2, 3], "neurons": 1, "accuracy": 0.0},  # a tie, won by gaba
        {"synapses": [4, 7], "neurons": 1, "accuracy": 1.0},
    ]


def test_absent_class_single_neuron_ties_and_nan() -> None:
    table = table_of(
        [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], NAN, [0.0, 0.0, 1.0]],
        {
            "neuron_id": [7, 7, 7, None],
            "neurotransmitter": ["gaba", "gaba", "gaba", None],
        },
    )
    measured = metrics.measure(table)
    json.dumps(measured, allow_nan=False)
    assert measured["synapses"]["confusion"] == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    per_class = measured["synapses"]["per_class"]
    assert per_class["gaba"] == {
        "support": 2,
        "called": 1,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
    }
    assert per_class["acetylcholine"]["precision"] == 0.0  # called, and never right
    assert per_class["acetylcholine"]["recall"] is None
    assert per_class["dopamine"]["f1"] is None
    # The first class wins the tie of 1 : 1. With a single neuron, nearly every
    # accuracy is possible.
    assert measured["neurons"]["confusion"][0] == [1, 0, 0]
    low, high = measured["neurons"]["interval"]["accuracy"]
    assert low < 0.21 and high == 1
    assert measured["neurons"]["interval"]["macro_f1"] is None
    assert measured["hemilineages"] is measured["cell_types"] is None
    assert measured["brain_regions"] == {}
    assert measured["expected_probability"] == [
        [pytest.approx(0.25), pytest.approx(0.75), 0.0],
        None,
        None,
    ]
    assert measured["correlation"]["neurons_within_hemilineages"] is None


def test_nothing_predicted_is_nothing_right() -> None:
    table = table_of([NAN] * 3, {"neurotransmitter": ["gaba"] * 3})
    measured = metrics.measure(table)
    json.dumps(measured, allow_nan=False)
    for what in ("synapses", "neurons"):
        assert measured[what]["count"] == 0 and measured[what]["accuracy"] is None
    assert measured["loss"] is None and measured["calibration"]["ece"] is None


def test_groups_with_several_known_transmitters_do_not_count() -> None:
    table = table_of(
        [[1, 0, 0]] * 4,
        {
            "neuron_id": [1, 1, 2, 3],
            "neurotransmitter": ["gaba", "dopamine", "gaba+dopamine", "gaba"],
            "hemilineage": ["A", "A", "A", "B"],
        },
    )
    measured = metrics.measure(table)
    assert measured["neurons"]["count"] == 1
    assert measured["hemilineages"]["confusion"][0] == [1, 0, 0]
    assert measured["hemilineages"]["count"] == 1


def test_numbers_of_a_small_table() -> None:
    table = table_of(
        [[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]]
        + [[0.6, 0.1, 0.3], [0.1, 0.8, 0.1], NAN],
        {
            "neurotransmitter": [
                "gaba",
                "gaba",
                "gaba",
                "dopamine",
                "dopamine",
                None,
                "gaba",
            ],
            "neuron_id": [1, 1, 1, 2, 2, 3, 4],
        },
    )
    measured = metrics.measure(table)
    # Rows without a prediction have no class, so the last row does not count.
    assert measured["synapses"]["confusion"] == [[2, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert measured["synapses"]["accuracy"] == pytest.approx(3 / 5)
    assert measured["synapses"]["mean_class_accuracy"] == pytest.approx(
        (2 / 3 + 1 / 2) / 2
    )
    assert measured["synapses"]["per_class"]["acetylcholine"]["recall"] is None
    # Two of the three calls of neuron 1 are gaba. Neuron 2 has a tie, which the first
    # class wins.
    assert measured["neurons"]["confusion"] == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]
    logs = np.log([0.7, 0.2, 0.4, 0.8, 0.3])
    assert measured["loss"] == pytest.approx(-logs.mean(), rel=1e-6)


def test_neurons_of_a_hemilineage_err_together_or_not() -> None:
    """Four hemilineages of gaba: first their neurons are called alike, then mixed."""
    gaba, ach = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    for alike in (True, False):
        calls = [gaba] * 10 + [ach] * 10 if alike else [gaba, ach] * 10
        table = table_of(
            [call for call in calls for _ in range(3)],
            {
                "neuron_id": np.repeat(np.arange(20), 3),
                "neurotransmitter": ["gaba"] * 60,
                "hemilineage": np.repeat(["A", "B", "C", "D"], 15),
            },
        )
        correlation = metrics.measure(table)["correlation"]
        assert correlation["synapses_within_neurons"] == 1
        within = correlation["neurons_within_hemilineages"]
        assert within == 1 if alike else within == 0


def test_a_tenth_of_the_neurons_is_smaller() -> None:
    sizes = np.arange(1, 22)
    table = table_of(
        [[0.8, 0.1, 0.1]] * sizes.sum(),
        {
            "neuron_id": np.repeat(np.arange(21), sizes),
            "neurotransmitter": ["gaba"] * sizes.sum(),
        },
    )
    assert metrics.measure(table)["neurons"]["tenth_of_synapses"] == 3
