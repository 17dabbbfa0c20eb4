# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from synister_jax.evaluation import mixtures

# P(called | true) of a network that confuses the second class with the third.
ROWS = np.array(
    [
        [0.85, 0.05, 0.06, 0.04],
        [0.04, 0.70, 0.20, 0.06],
        [0.05, 0.25, 0.65, 0.05],
        [0.02, 0.03, 0.05, 0.90],
    ]
)
K = len(ROWS)
ONE_OF_EACH = np.eye(K)


def outcomes(units: int) -> np.ndarray:
    every = itertools.product(range(units + 1), repeat=K)
    return np.array([calls for calls in every if sum(calls) == units])


def log_likelihood(calls: np.ndarray, probabilities: np.ndarray) -> float:
    return sum(n * math.log(p) for n, p in zip(calls, probabilities, strict=True) if n)


def best_mixture(calls: np.ndarray, rows: np.ndarray) -> tuple[float, int, int, float]:
    found = []
    for first, second in itertools.permutations(range(len(rows)), 2):
        for percent in range(5, 55, 5):
            share = percent / 100
            mixed = [
                (1 - share) * a + share * b
                for a, b in zip(rows[first], rows[second], strict=True)
            ]
            found.append((log_likelihood(calls, mixed), first, second, share))
    return max(found, key=lambda entry: entry[0])


def test_fit_is_that_of_a_plain_loop() -> None:
    model = mixtures.from_fractions(ROWS, 0)
    counts = np.random.default_rng(0).integers(0, 9, (40, K))
    fitted = mixtures.fit(counts, model)
    mixed = 0
    for index, calls in enumerate(counts):
        single = [log_likelihood(calls, row) for row in ROWS]
        value, first, second, share = best_mixture(calls, ROWS)
        assert fitted.log_likelihood[index] == pytest.approx(single)
        assert fitted.single[index] == np.argmax(single)
        ratio = max(value - max(single), 0)
        assert fitted.statistic()[index] == pytest.approx(ratio, abs=1e-6)
        if ratio > 1e-3:
            mixed += 1
            assert log_likelihood(
                calls,
                (1 - fitted.share[index]) * ROWS[fitted.first[index]]
                + fitted.share[index] * ROWS[fitted.second[index]],
            ) == pytest.approx(value)
            assert fitted.share[index] == pytest.approx(share)
        elif ratio == 0:
            assert fitted.second[index] == -1 and fitted.share[index] == 0
    assert 5 < mixed < 40


@pytest.mark.parametrize(
    "correlation, concentration", [(0.0, np.inf), (0.3, np.inf), (0.0, 12.0)]
)
def test_p_values_are_those_of_all_outcomes(
    correlation: float, concentration: float
) -> None:
    exact = mixtures.from_fractions(ROWS, correlation)
    model = mixtures.CallModel(
        exact.confusion, exact.hypotheses, np.full(K, concentration), correlation
    )
    calls = outcomes(4)
    single = np.array([[log_likelihood(x, row) for row in ROWS] for x in calls])
    mixed = np.array([best_mixture(x, ROWS)[0] for x in calls])
    ratios = np.maximum(mixed, single.max(axis=1))[:, None] - single
    expected = np.zeros(len(calls))
    for label, row in enumerate(ROWS):
        if correlation:
            null = stats.dirichlet_multinomial(row * (1 / correlation - 1), 4)
        elif math.isfinite(concentration):
            null = stats.dirichlet_multinomial(row * concentration, 4)
        else:
            null = stats.multinomial(4, row)
        chance = null.pmf(calls)
        assert chance.sum() == pytest.approx(1)
        # reached[i, j]: outcome j is at least as extreme as outcome i.
        reached = ratios[:, label] >= ratios[:, label, None] - 1e-9
        expected = np.maximum(expected, reached @ chance)
    found = mixtures.p_values(calls, model, draws=15_000)
    np.testing.assert_allclose(found, expected, atol=0.018)
    assert expected.min() < 0.1 and np.unique(expected.round(6)).size > 20


def test_calls_scatter_as_much_as_the_correlation_says() -> None:
    rng = np.random.default_rng(0)
    model = mixtures.from_fractions(ROWS, 0.2)
    shares = np.array([0.75, 0, 0, 0.25])
    calls = mixtures.draw(rng, model, shares, 50, 20_000)
    mean = shares @ ROWS
    assert (calls.sum(axis=1) == 50).all()
    np.testing.assert_allclose(calls.mean(axis=0) / 50, mean, atol=0.005)
    variance = 50 * mean * (1 - mean) * (1 + 49 * 0.2)
    np.testing.assert_allclose(calls.var(axis=0), variance, rtol=0.06)


def test_what_is_not_known_of_the_confusion_scatters_too() -> None:
    rng = np.random.default_rng(0)
    model = mixtures.from_counts(np.diag([10, 10, 10, 10]), 0)
    calls = mixtures.draw(rng, model, ONE_OF_EACH[0], 100_000, 5_000)
    row = model.confusion[0]
    # The row has a Dirichlet distribution of its ten units, with 0.5 added to each of
    # the four cells.
    np.testing.assert_allclose(row, [10.5 / 12, 0.5 / 12, 0.5 / 12, 0.5 / 12])
    deviation = np.sqrt(row * (1 - row) / 13)
    np.testing.assert_allclose(calls.std(axis=0) / 1e5, deviation, rtol=0.08)


@pytest.mark.parametrize("correlation", [0.9, 0.9999])
def test_groups_of_units_that_are_all_alike(correlation: float) -> None:
    model = mixtures.from_fractions(ROWS, correlation)
    calls = mixtures.draw(np.random.default_rng(0), model, ONE_OF_EACH[1], 20, 4_000)
    np.testing.assert_allclose(calls.mean(axis=0) / 20, ROWS[1], atol=0.03)
    alike = (calls == 20).any(axis=1).mean()
    assert alike > (0.6 if correlation == 0.9 else 0.99)
    assert mixtures.least_units(model, 0.01, 999) is None


def rates(
    units: int, truth: mixtures.CallModel, test: mixtures.CallModel
) -> np.ndarray:
    """Returns how often p ≤ 0.05, for each true class."""
    rng = np.random.default_rng(units)
    calls = [mixtures.draw(rng, truth, row, units, 400) for row in ONE_OF_EACH]
    p = mixtures.p_values(np.concatenate(calls), test, 999)
    return (p <= 0.05).reshape(K, -1).mean(axis=1)


@pytest.mark.parametrize("units", [3, 10, 100, 1_000])
@pytest.mark.parametrize("correlation", [0.0, 0.05])
def test_level(units: int, correlation: float) -> None:
    model = mixtures.from_fractions(ROWS, correlation)
    found = rates(units, model, model)
    # The margins are three standard errors of 1,600 groups, and of 400 groups.
    assert found.mean() < 0.05 + 3 * 0.0055
    assert found.max() < 0.05 + 3 * 0.011


def test_units_alike_that_are_taken_for_independent_pass_for_mixtures() -> None:
    truth = mixtures.from_fractions(ROWS, 0.05)
    assert rates(1_000, truth, mixtures.from_fractions(ROWS, 0)).mean() > 0.3


def test_level_with_an_estimated_confusion() -> None:
    truth = mixtures.from_fractions(ROWS, 0.0)
    drawn, taken_as_exact = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        labelled = np.stack(
            [mixtures.draw(rng, truth, row, 50, 1)[0] for row in ONE_OF_EACH]
        )
        model = mixtures.from_counts(labelled, 0.0)
        exact = mixtures.CallModel(
            model.confusion, model.hypotheses, np.full(K, np.inf), 0
        )
        drawn.append(rates(300, truth, model).mean())
        taken_as_exact.append(rates(300, truth, exact).mean())
    assert np.mean(drawn) < 0.09
    assert np.mean(taken_as_exact) > 0.15


def test_power_grows_with_share_and_units() -> None:
    model = mixtures.from_fractions(ROWS, 0.05)

    def found(share: float, units: int) -> float:
        rng = np.random.default_rng(0)
        shares = np.array([1 - share, 0, 0, share])
        calls = mixtures.draw(rng, model, shares, units, 300)
        return float((mixtures.p_values(calls, model, 999) <= 0.05).mean())

    assert found(0.5, 100) > 0.9
    assert found(0.1, 100) < found(0.25, 100) < found(0.5, 100)
    assert found(0.3, 5) < found(0.3, 30)


def test_neither_order_nor_company_of_groups_matters() -> None:
    model = mixtures.from_counts(ROWS * 200, 0.05)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(rng.choice([3, 30, 90], 200), np.full(K, 1 / K))
    counts[0] = 0
    p = mixtures.p_values(counts, model, 499)
    order = rng.permutation(200)
    np.testing.assert_array_equal(
        mixtures.p_values(counts[order], model, 499), p[order]
    )
    np.testing.assert_array_equal(mixtures.p_values(counts[7:9], model, 499), p[7:9])
    assert p[0] == 1 and p.min() == 1 / 500 and (p <= 1).all()
    assert (mixtures.p_values(counts, model, 499, seed=1) != p).any()


def test_more_groups_than_are_fitted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtures.from_fractions(ROWS, 0)
    counts = np.random.default_rng(0).integers(0, 60, (25, K))
    whole = mixtures.fit(counts, model)
    monkeypatch.setattr(mixtures, "_ROWS_AT_ONCE", 7)
    parts = mixtures.fit(counts, model)
    np.testing.assert_allclose(parts.mixture, whole.mixture)
    np.testing.assert_array_equal(parts.second, whole.second)


def test_rounding_of_units_is_towards_not_rejecting() -> None:
    units = np.array([0, 7, 99, 100, 101, 119, 1_099, 12_999, 720_000])
    rounded = mixtures._two_digits(units)
    assert rounded.tolist() == [0, 7, 99, 100, 100, 110, 1_000, 12_000, 720_000]
    model = mixtures.from_fractions(ROWS, 0.05)
    rng = np.random.default_rng(0)
    calls = mixtures.draw(rng, model, ONE_OF_EACH[0], 109, 2_000)
    assert (mixtures.p_values(calls, model, 1_999) <= 0.05).mean() < 0.05 + 3 * 0.005


def test_classes_without_labelled_units_are_no_hypotheses() -> None:
    counts = np.array([[8, 1, 1], [0, 0, 0], [2, 0, 6]])
    model = mixtures.from_counts(counts, 0.1)
    assert model.hypotheses == (0, 2)
    assert (model.confusion > 0).all()
    np.testing.assert_allclose(model.confusion.sum(axis=1), 1)
    np.testing.assert_allclose(model.confusion[0], np.array([8.5, 1.5, 1.5]) / 11.5)
    fitted = mixtures.fit(np.array([[1, 9, 1], [5, 0, 5]]), model)
    assert set(fitted.single) | set(fitted.first) <= {0, 2}
    assert fitted.second[1] in (0, 2) and fitted.second[1] != fitted.first[1]
    with pytest.raises(ValueError, match="two classes"):
        mixtures.from_counts(np.diag([5, 0, 0]), 0)
    with pytest.raises(ValueError, match="correlation"):
        mixtures.from_counts(counts, 1.0)


def test_units_of_few_groups_tell_less_of_the_confusion() -> None:
    counts = np.array([[90, 10], [20, 80]])
    independent = mixtures.from_counts(counts, 0.1, clusters=np.array([100, 100]))
    alike = mixtures.from_counts(counts, 0.1, clusters=np.array([10, 0]))
    np.testing.assert_allclose(independent.concentration, 101)
    # 100 units in ten groups are worth 100 / (1 + 9 · 0.1) independent units. 100 units
    # in one group are worth 100 / (1 + 99 · 0.1).
    np.testing.assert_allclose(alike.concentration, [100 / 1.9 + 1, 100 / 10.9 + 1])
    np.testing.assert_allclose(
        alike.confusion[0], np.array([90 / 1.9 + 0.5, 10 / 1.9 + 0.5]) / (100 / 1.9 + 1)
    )


def test_fractions_have_a_floor_and_no_doubt() -> None:
    rows = np.array([[1.0, 0, 0], [0.1, 0.9, 0], [0, 0, 0]])
    model = mixtures.from_fractions(rows, 0)
    assert model.hypotheses == (0, 1) and np.isinf(model.concentration).all()
    np.testing.assert_allclose(model.confusion[0], np.array([1, 0.005, 0.005]) / 1.01)


def test_least_units() -> None:
    model = mixtures.from_fractions(ROWS, 0.05)
    least = mixtures.least_units(model, 0.05, 1_999)
    assert least == 4
    assert mixtures.p_values(outcomes(least), model, 1_999).min() <= 0.05
    assert mixtures.p_values(outcomes(least - 1), model, 1_999).min() > 0.05
    assert mixtures.least_units(model, 0.001, 1_999) > least
    assert mixtures.least_units(model, 0.0001, 99) is None  # the smallest p is 1/100


@pytest.mark.parametrize("true", [0.0, 0.05, 0.3])
def test_correlation_of_simulated_groups(true: float) -> None:
    model = mixtures.from_fractions(ROWS, true)
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        calls = [
            mixtures.draw(rng, model, ONE_OF_EACH[label], units, 15)
            for label, units in itertools.product(range(K), (5, 40))
        ]
        labels = np.repeat(np.arange(K), 30)
        found.append(mixtures.correlation(np.concatenate(calls), labels))
    error = np.std(found) / len(found) ** 0.5
    # Estimates below 0 are set to 0. If the true value is 0, this raises the mean of
    # the estimates, which are made from 120 groups each.
    assert abs(np.mean(found) - true) < 3 * error + (0.004 if true == 0 else 0)


def test_correlation_is_that_of_the_analysis_of_variance() -> None:
    groups = [[1, 1, 1, 0], [1, 0], [0, 0, 0], [1, 1, 0, 1, 1, 0]]
    counts = np.array([[sum(g), len(g) - sum(g)] for g in groups])
    values = [value for group in groups for value in group]
    overall = sum(values) / len(values)
    between = within = 0.0
    for group in groups:
        mean = sum(group) / len(group)
        for value in group:
            between += (mean - overall) ** 2
            within += (value - mean) ** 2
    between /= len(groups) - 1
    within /= len(values) - len(groups)
    size = (len(values) - sum(len(g) ** 2 for g in groups) / len(values)) / 3
    expected = (between - within) / (between + (size - 1) * within)
    assert expected > 0.05
    found = mixtures.correlation(counts, np.zeros(4, int))
    assert found == pytest.approx(expected)
    # Groups of unknown class, and groups without units, do not count.
    more = np.concatenate([counts, [[9, 0], [0, 0]]])
    assert mixtures.correlation(more, np.array([0] * 4 + [-1, 0])) == found


def test_correlation_at_the_ends() -> None:
    alike = np.array([[5, 0], [0, 5], [5, 0], [0, 5]])
    assert mixtures.correlation(alike, np.zeros(4, int)) == pytest.approx(1)
    assert mixtures.correlation(np.full((4, 2), 5), np.zeros(4, int)) == 0
    nothing = [
        (np.array([[5, 1]]), [0]),  # one group
        (np.array([[1, 0], [0, 1]]), [0, 0]),  # one unit each
        (np.array([[5, 0], [7, 0]]), [0, 0]),  # all called the same
        (np.array([[5, 1], [2, 2]]), [0, 1]),  # a group of each class
        (np.array([[5, 1], [2, 2]]), [-1, -1]),
    ]
    for counts, truth in nothing:
        assert mixtures.correlation(counts, np.array(truth)) is None
