# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from synister_jax import bootstrap


def test_every_draw_is_an_accuracy_of_whole_neurons() -> None:
    """Against a loop that draws neurons with the same numbers."""
    rng = np.random.default_rng(3)
    group = rng.integers(0, 12, 200)
    truth = group % 3
    called = np.where(rng.random(200) < 0.7, truth, rng.integers(0, 3, 200))
    found = bootstrap.intervals(group, truth, called, 3)
    accuracies, recalls = [], []
    own = np.random.default_rng(0)
    for _ in range(bootstrap.DRAWS // 50):
        for drawn in own.multinomial(12, np.full(12, 1 / 12), 50):
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
    """Neurons that are all right or all wrong: as sure as 30 coins, not 3,000."""
    neuron = np.repeat(np.arange(30), 100)
    truth = np.zeros(3000, int)
    called = (neuron < 9).astype(int)
    low, high = bootstrap.intervals(neuron, truth, called, 2)["accuracy"]
    assert 0.3 < high - low < 0.36  # 2 · 1.96 · √(0.7 · 0.3 / 30) = 0.328
    alone = np.full(3000, -1)
    low, high = bootstrap.intervals(alone, truth, called, 2)["accuracy"]
    assert 0.028 < high - low < 0.038  # a tenth


def test_what_is_not_known_does_not_count() -> None:
    group = np.arange(100)
    truth, called = np.zeros(100, int), np.arange(100) % 2
    expected = bootstrap.intervals(group, truth, called, 2)
    more = bootstrap.intervals(
        np.append(group, [100, 101]),
        np.append(truth, [-1, 0]),
        np.append(called, [0, -1]),
        2,
    )
    assert more == expected


@pytest.mark.parametrize("count", [0, 1])
def test_one_neuron_has_no_interval(count: int) -> None:
    one = np.zeros(count, int)
    found = bootstrap.intervals(one, one, one, 2)
    assert set(found.values()) == {None} and "macro_f1" in found
