# SPDX-License-Identifier: Apache-2.0
"""Tests whether the units of a group have one transmitter or several.

A group (a neuron or a hemilineage) has units (its synapses or its neurons). Each unit
is called one of k classes. If all units truly have class t, the calls scatter as the
network confuses t. If the units have two classes, the calls are a mixture of two rows
of the confusion. The test statistic is the likelihood ratio of these two hypotheses.

A simulation finds how large the statistic becomes by chance. The units of a group are
not independent, so the calls of a group follow a Dirichlet-multinomial distribution.
The confusion itself is estimated from a limited number of labelled units.
docs/one_transmitter.md has the assumptions and the measured error rates.
"""

import dataclasses
import itertools

import numpy as np

# The shares of the second class that are tried. Every pair is tried in both orders, so
# shares above 0.5 are covered too.
_SHARES = np.linspace(0.05, 0.5, 10)
# Fractions are published with two digits, so a printed 0 can be any number below this.
FLOOR = 0.005
_ROWS_AT_ONCE = 10_000  # This many groups are fitted at once, to limit the memory.
# Two statistics that differ by less than this count as equal. Otherwise, the order in
# which the same logarithms are summed could break a tie.
_TIE = 1e-7


@dataclasses.dataclass(frozen=True)
class CallModel:
    """A model of how the calls scatter in a group whose units have one class.

    Attributes:
      confusion: [k, k] float64, P(called | true), where no entry is 0.
      hypotheses: the classes that a group can have, which are the classes with labelled
        units; at least two.
      concentration: [k] Dirichlet concentration of the estimate of each row; infinite
        where the row is exact.
      correlation: intraclass correlation ρ of the calls within a group, 0 ≤ ρ < 1.

    Raises:
      ValueError: the correlation is out of its range, or there are fewer than two
        hypotheses.
    """

    confusion: np.ndarray
    hypotheses: tuple[int, ...]
    concentration: np.ndarray
    correlation: float

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1:
            raise ValueError(f"the correlation {self.correlation} is not in [0, 1)")
        if len(self.hypotheses) < 2:
            raise ValueError("the model needs at least two classes with labelled units")


def from_counts(
    counts: np.ndarray, correlation: float, clusters: np.ndarray | None = None
) -> CallModel:
    """Returns the model of a confusion that is given as counts of labelled units.

    Jeffreys' prior adds half a unit to each cell, so no probability is 0. A Dirichlet
    distribution describes how uncertain each row is.

    Args:
      counts: [k, k] numbers of labelled units; rows are true classes, columns are
        called classes.
      correlation: intraclass correlation ρ of the calls within a group.
      clusters: [k] numbers of groups that the units of each row come from. N units from
        G groups count as N / (1 + (N/G − 1)·ρ) independent units (Kish's design
        effect). None means that the units are independent.
    """
    counts = np.asarray(counts, np.float64)
    k, units = len(counts), counts.sum(axis=1)
    if clusters is not None:
        size = units / np.maximum(clusters, 1)
        counts = counts / (1 + np.maximum(size - 1, 0) * correlation)[:, None]
    posterior = counts + 0.5
    concentration = counts.sum(axis=1) + k / 2
    hypotheses = tuple(int(row) for row in np.flatnonzero(units))
    return CallModel(
        posterior / concentration[:, None], hypotheses, concentration, correlation
    )


def from_fractions(fractions: np.ndarray, correlation: float) -> CallModel:
    """Returns the model of a published confusion [k, k] with rows P(called | true).

    Entries below `FLOOR` are raised to `FLOOR`, and each row is scaled to a sum of 1.
    The rows count as exact, because fractions do not show how many units they come
    from.
    """
    occurring = fractions.sum(axis=1) > 0
    raised = np.maximum(fractions, FLOOR)
    confusion = raised / raised.sum(axis=1, keepdims=True)
    hypotheses = tuple(int(row) for row in np.flatnonzero(occurring))
    return CallModel(
        confusion, hypotheses, np.full(len(fractions), np.inf), correlation
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """The best single class and the best mixture of two classes for each of n groups.

    Log-likelihoods are in nats, without the multinomial coefficient.

    Attributes:
      single: [n] index of the best single class.
      log_likelihood: [n, hypotheses] log-likelihood of each single class.
      first: [n] index of the first class of the best mixture.
      second: [n] index of the second class; −1 where no mixture is likelier than the
        best single class.
      share: [n] share of the second class, at most 0.5; 0 where `second` is −1.
      mixture: [n] log-likelihood of the best mixture.
    """

    single: np.ndarray
    log_likelihood: np.ndarray
    first: np.ndarray
    second: np.ndarray
    share: np.ndarray
    mixture: np.ndarray

    def statistic(self) -> np.ndarray:
        """Returns the log-likelihood ratio of mixture and best class, [n] nats, ≥ 0."""
        return np.maximum(self.mixture - self.log_likelihood.max(axis=1), 0)


def fit(counts: np.ndarray, model: CallModel) -> Fit:
    """Fits the calls [n, k] of n groups.

    If several classes or pairs of classes are equally likely, the first is used.
    """
    pairs = list(itertools.permutations(model.hypotheses, 2))
    first, second = (np.repeat(side, len(_SHARES)) for side in np.transpose(pairs))
    share = np.tile(_SHARES, len(pairs))
    mixed = np.log(_mixtures(model))
    single = np.log(model.confusion[list(model.hypotheses)])
    best = np.empty(len(counts), np.int64)
    mixture = np.empty(len(counts))
    log_likelihood = np.empty((len(counts), len(single)))
    for start in range(0, len(counts), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        calls = counts[rows].astype(np.float64)
        log_likelihood[rows] = calls @ single.T
        likelihoods = calls @ mixed.T
        best[rows] = likelihoods.argmax(axis=1)
        mixture[rows] = likelihoods.max(axis=1)
    called = np.asarray(model.hypotheses)[log_likelihood.argmax(axis=1)]
    alone = mixture <= log_likelihood.max(axis=1) + _TIE
    return Fit(
        single=called,
        log_likelihood=log_likelihood,
        first=np.where(alone, called, first[best]),
        second=np.where(alone, -1, second[best]),
        share=np.where(alone, 0, share[best]),
        mixture=np.where(alone, log_likelihood.max(axis=1), mixture),
    )


def _mixtures(model: CallModel) -> np.ndarray:
    """Returns P(called) [pairs · shares, k] of every mixture that is tried."""
    pairs = np.array(list(itertools.permutations(model.hypotheses, 2)))
    rows = model.confusion[pairs]  # [pairs, 2, k]
    weights = np.stack([1 - _SHARES, _SHARES], axis=1)  # [shares, 2]
    return np.einsum("sw,pwk->psk", weights, rows).reshape(-1, len(model.confusion))


def draw(
    rng: np.random.Generator,
    model: CallModel,
    shares: np.ndarray,
    units: int,
    groups: int,
) -> np.ndarray:
    """Draws the calls [groups, k] of simulated groups.

    For each group, the rows of the confusion are first drawn from their Dirichlet
    distributions and mixed by `shares`. The probabilities of the group are then drawn
    around this mixture: the higher the correlation, the more they scatter.

    Args:
      shares: [k] true shares of the classes in each group.
      units: the number of units of each group.
      groups: the number of groups.
    """
    mean = np.zeros((groups, len(model.confusion)))
    for row in np.flatnonzero(shares):
        expected, known = model.confusion[row], model.concentration[row]
        drawn = expected if np.isinf(known) else rng.dirichlet(known * expected, groups)
        mean += shares[row] * drawn
    if model.correlation > 0:
        mean = _dirichlet(rng, mean * (1 / model.correlation - 1))
    return rng.multinomial(units, mean / mean.sum(axis=1, keepdims=True))


def _dirichlet(rng: np.random.Generator, concentration: np.ndarray) -> np.ndarray:
    """Draws one Dirichlet row for each row of concentrations.

    The computation uses logarithms, so that tiny concentrations do not underflow to 0.
    """
    concentration = np.maximum(concentration, 1e-12)
    log = np.log(rng.standard_gamma(concentration + 1))
    log -= rng.standard_exponential(concentration.shape) / concentration
    return np.exp(log - log.max(axis=1, keepdims=True))


def p_values(
    counts: np.ndarray, model: CallModel, draws: int = 9_999, seed: int = 0
) -> np.ndarray:
    """Returns the p-values [n] of the hypothesis that each group has a single class.

    For each class t, the likelihood ratio of the best mixture and t is computed. The
    ratio is compared with the ratios of `draws` simulated groups of class t with the
    same number of units. The p-value is the largest over all t, so the test holds its
    level whichever class is true.

    A number of units above 100 is rounded down to two digits, and the ratio is scaled
    down by the same factor. A group without units has the p-value 1. Equal counts,
    model, draws and seed give equal p-values.

    Args:
      counts: [n, k] numbers of units of each group that are called each class.
    """
    counts = np.asarray(counts)
    units = counts.sum(axis=1)
    rounded = _two_digits(units)
    fitted = fit(counts, model)
    scale = rounded / np.maximum(units, 1)
    ratios = _ratios(fitted) * scale[:, None]
    result = np.ones(len(counts))
    for size in np.unique(rounded[rounded > 0]):
        members = np.flatnonzero(rounded == size)
        largest = np.zeros(len(members))
        for column, row in enumerate(model.hypotheses):
            null = _null(model, row, int(size), draws, seed)
            below = np.searchsorted(null, ratios[members, column] - _TIE)
            p = (1 + draws - below) / (1 + draws)
            largest = np.maximum(largest, p)
        result[members] = largest
    return result


def _ratios(fitted: Fit) -> np.ndarray:
    """Returns the log-likelihood ratio of best mixture and class, [n, hypotheses]."""
    return fitted.mixture[:, None] - fitted.log_likelihood


def _null(model: CallModel, row: int, units: int, draws: int, seed: int) -> np.ndarray:
    """Returns the ratios of simulated groups of class `row` to `row`, ascending."""
    rng = np.random.default_rng([seed, row, units])
    shares = np.eye(len(model.confusion))[row]
    simulated = fit(draw(rng, model, shares, units, draws), model)
    return np.sort(_ratios(simulated)[:, model.hypotheses.index(row)])


def _two_digits(units: np.ndarray) -> np.ndarray:
    power = 10 ** np.maximum(np.char.str_len(units.astype(str)) - 2, 0)
    return np.where(units <= 100, units, units // power * power)


def least_units(
    model: CallModel, level: float, draws: int = 9_999, seed: int = 0
) -> int | None:
    """Returns the smallest number of units that can give a p-value of at most `level`.

    The function tries 2 to 20, 30, 50 and 100 units, and calls of two classes. It
    returns None if none of these numbers is enough: the correlation is too high, the
    classes are too similar, or `draws` is too small.
    """
    k = len(model.confusion)
    for units in (*range(2, 21), 30, 50, 100):
        outcomes = [
            ones * np.eye(k, dtype=np.int64)[one]
            + (units - ones) * np.eye(k, dtype=np.int64)[other]
            for one, other in itertools.combinations(range(k), 2)
            for ones in range(1, units)
        ]
        if p_values(np.array(outcomes), model, draws, seed).min() <= level:
            return units
    return None


def correlation(counts: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the intraclass correlation of the calls within groups, 0 to 1.

    The ANOVA estimator is applied to the indicators of the k calls. The variance within
    groups (a) and between groups (b) is pooled over the true classes, and the
    correlation is b / (a + b). It is 0 where the calls vary less between groups than by
    chance.

    Args:
      counts: [n, k] numbers of units of each group that are called each class.
      truth: [n] index of the true class of each group; −1 where it is unknown.

    Returns:
      The correlation. None if no class has two groups of which one has at least two
      units, or if all calls of each class are equal.
    """
    counts, truth = np.asarray(counts, np.float64), np.asarray(truth)
    between_pooled = total_pooled = 0.0
    for label in np.unique(truth[truth >= 0]):
        group = counts[(truth == label) & (counts.sum(axis=1) > 0)]
        units = group.sum(axis=1)
        groups, all_units = len(group), units.sum()
        if groups < 2 or all_units == groups:
            continue
        fraction = group / units[:, None]
        mean = group.sum(axis=0) / all_units
        scatter = (units[:, None] * (fraction - mean) ** 2).sum() / (groups - 1)
        within = (group * (1 - fraction)).sum() / (all_units - groups)
        typical = (all_units - (units**2).sum() / all_units) / (groups - 1)
        between = (scatter - within) / typical
        between_pooled += (groups - 1) * between
        total_pooled += (groups - 1) * (between + within)
    if total_pooled <= 0:
        return None
    return float(np.clip(between_pooled / total_pooled, 0, 1))
