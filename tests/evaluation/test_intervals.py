# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from synister_jax.evaluation import intervals


def test_every_draw_is_an_accuracy_of_whole_neurons() -> None:
    """A loop that draws neurons with the same random numbers gives equal intervals."""
    rng = np.random.default_rng(3)
    group = rng.integers(0, 12, 200)
    truth = group % 3
    called = np.where(rng.random(200) < 0.7, truth, rng.integers(0, 3, 200))
    found = intervals.by_group(group, truth, called, 3)
    accuracies, recalls = [], []
    own = np.random.default_rng(0)
    for _ in range(intervals.DRAWS // 50):
        weights = np.append(np.ones(12), np.zeros(9)) / 12
        for drawn in own.multinomial(12, weights, 50):
            rows = np.concatenate(
                [np.flatnonzero(group == g) for g in range(12) for _ in range(drawn[g])]
            )
            right = truth[rows] == called[rows]
            accuracies.append(right.mean())
            labels = np.unique(truth[rows])
            recalls.append(np.mean([right[truth[rows] == t].mean() for t in labels]))
    assert found["accuracy"] == pytest.approx(np.percentile(accuracies, [2.5, 97.5]))
    assert found["mean_class_accuracy"] == pytest.approx(
        np.percentile(recalls, [2.5, 97.5])
    )


def test_whole_neurons_make_wider_intervals_than_synapses() -> None:
    """30 neurons, each all right or all wrong, scatter like 30 coins, not 3,000."""
    neuron = np.repeat(np.arange(30), 100)
    truth = np.zeros(3000, int)
    called = (neuron < 9).astype(int)
    low, high = intervals.by_group(neuron, truth, called, 2)["accuracy"]
    assert 0.3 < high - low < 0.36  # 2 · 1.96 · √(0.7 · 0.3 / 30) = 0.328
    alone = np.full(3000, -1)
    low, high = intervals.by_group(alone, truth, called, 2)["accuracy"]
    assert 0.028 < high - low < 0.038  # a tenth of the width above


def test_entries_of_no_neuron_are_drawn_as_neurons_of_one() -> None:
    rng = np.random.default_rng(5)
    truth = rng.integers(0, 3, 400)
    called = np.where(rng.random(400) < 0.8, truth, 0)
    one = intervals.by_group(np.arange(400), truth, called, 3)
    alone = intervals.by_group(np.full(400, -1), truth, called, 3)
    for name, limits in one.items():
        assert alone[name] == pytest.approx(limits, abs=0.01)  # the draws differ
    # Half of the entries have a neuron, the other half have none.
    mixed = np.where(np.arange(400) % 2, np.arange(400), -1)
    both = intervals.by_group(mixed, truth, called, 3)
    assert both["accuracy"] == pytest.approx(one["accuracy"], abs=0.01)


def test_draws_that_are_all_equal_say_nothing() -> None:
    right = np.zeros(21, int)
    found = intervals.by_group(np.arange(21), right, right, 2)
    assert set(found.values()) == {None}


@pytest.mark.parametrize(("right", "count"), [(21, 21), (0, 5), (9, 10)])
def test_interval_of_a_share(right: int, count: int) -> None:
    """The interval equals Wilson's formula, which is written out here."""
    z, p = 1.959963984540054, right / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    half *= z
    found = intervals.wilson(right, count)
    assert found == pytest.approx([middle - half, middle + half], abs=1e-9)
    assert intervals.wilson(0, 0) is None


def test_what_is_not_known_does_not_count() -> None:
    group = np.arange(100)
    truth, called = np.zeros(100, int), np.arange(100) % 2
    expected = intervals.by_group(group, truth, called, 2)
    more = intervals.by_group(
        np.append(group, [100, 101]),
        np.append(truth, [-1, 0]),
        np.append(called, [0, -1]),
        2,
    )
    assert more == expected


@pytest.mark.parametrize("count", [0, 1])
def test_one_neuron_has_no_interval(count: int) -> None:
    one = np.zeros(count, int)
    found = intervals.by_group(one, one, one, 2)
    assert set(found.values()) == {None} and "macro_f1" in found
