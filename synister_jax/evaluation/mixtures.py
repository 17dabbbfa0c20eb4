# SPDX-License-Identifier: Apache-2.0
"""One transmitter or several? A test on the calls within a group of units.

A group (a neuron, a hemilineage) has units (its synapses, its neurons), each called one
of k classes. If all units truly are of class t, calls scatter as the network confuses
t; if they are of two classes, calls are a mixture of two rows of the confusion. The
statistic is the likelihood ratio of the two. How large it gets by chance is simulated:
units of a group resemble each other, so calls of a group are Dirichlet-multinomial, and
the confusion itself is known from a limited number of labelled units.
docs/one_transmitter.md has the assumptions and the measured error rates.
"""

import dataclasses
import itertools

import numpy as np

# Shares of the second class that are tried; by symmetry of the pairs the rest as well.
_SHARES = np.linspace(0.05, 0.5, 10)
# Fractions are published with two digits: a printed 0 is anything below this.
FLOOR = 0.005
_ROWS_AT_ONCE = 10_000  # of log-likelihoods of all mixtures, to bound memory
# Two outcomes whose statistics differ by less are equally unlikely: sums of the same
# logarithms in another order must not break a tie.
_TIE = 1e-7


@dataclasses.dataclass(frozen=True)
class CallModel:
    """How calls scatter in a group of one class.

    `confusion` [k, k] float64 is P(called | true), no entry 0; `hypotheses` are the
    classes that a group may be of (those with labelled units), at least two;
    `concentration` [k] the Dirichlet concentration of what is known of each row
    (infinite: the row is exact); `correlation` the intraclass correlation of calls
    within a group, 0 ≤ ρ < 1.
    """

    confusion: np.ndarray
    hypotheses: tuple[int, ...]
    concentration: np.ndarray
    correlation: float

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1:
            raise ValueError(f"a correlation of {self.correlation} is not in [0, 1)")
        if len(self.hypotheses) < 2:
            raise ValueError("two classes with labelled units are needed")


def from_counts(
    counts: np.ndarray, correlation: float, clusters: np.ndarray | None = None
) -> CallModel:
    """The model of a confusion in counts [k, k] of labelled units, rows true.

    Jeffreys' prior, half a unit in each cell: no probability is 0, and what is not
    known of a row with few units is a Dirichlet distribution.

    Args:
      clusters: [k] how many groups the units of each row come from. N units of G groups
        count as the N / (1 + (N/G − 1)·ρ) independent ones that tell as much (Kish's
        design effect). None: units are independent.
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
    """The model of a published confusion [k, k] of rows P(called | true).

    Entries below `FLOOR` become that, and rows are scaled to a sum of 1. Rows count as
    exact: fractions do not tell how many units they come from.
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
    """The best single class and the best mixture of each of n groups.

    `single` [n] and `first`, `second` [n] are indices of classes, `share` [n] that of
    the second, at most 0.5 (0 and `second` −1 where no mixture is likelier than the
    single class); `log_likelihood` [n, hypotheses] of each single class and `mixture`
    [n] of the mixture, in nats, without the multinomial coefficient.
    """

    single: np.ndarray
    log_likelihood: np.ndarray
    first: np.ndarray
    second: np.ndarray
    share: np.ndarray
    mixture: np.ndarray

    def statistic(self) -> np.ndarray:
        """Log-likelihood ratio of mixture and best single class, [n], nats, ≥ 0."""
        return np.maximum(self.mixture - self.log_likelihood.max(axis=1), 0)


def fit(counts: np.ndarray, model: CallModel) -> Fit:
    """Fits calls [n, k] of n groups; of equals the first class and pair."""
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
    """P(called) [pairs · shares, k] of every mixture that is tried."""
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
    """Calls [groups, k] of groups with true `shares` [k] of the classes.

    Each group has rows of the confusion of its own, drawn from what is known of them;
    then the group's own probabilities around their mixture, by the correlation.
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
    """A row for each row; in logarithms, where tiny concentrations stay above 0."""
    concentration = np.maximum(concentration, 1e-12)
    log = np.log(rng.standard_gamma(concentration + 1))
    log -= rng.standard_exponential(concentration.shape) / concentration
    return np.exp(log - log.max(axis=1, keepdims=True))


def p_values(
    counts: np.ndarray, model: CallModel, draws: int = 9_999, seed: int = 0
) -> np.ndarray:
    """How unlikely calls [n, k] are if each group is of one class, whichever; [n].

    For each class t, the likelihood ratio of the best mixture and t is compared with
    that of `draws` simulated groups of class t and as many units; the p-value is
    the largest over all t, so the test holds its level whichever is true. Beyond 100,
    units are rounded down to two digits, and the ratio is scaled down likewise. A
    group without units has 1. The same counts, model and seed give the same numbers.
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
    """Log-likelihood ratio of the best mixture and each class, [n, hypotheses]."""
    return fitted.mixture[:, None] - fitted.log_likelihood


def _null(model: CallModel, row: int, units: int, draws: int, seed: int) -> np.ndarray:
    """Ratios of simulated groups of class `row` against that class, ascending."""
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
    """The smallest number of units at which calls can have a p-value ≤ `level`.

    Of calls of at most two classes; of 2 to 20, 30, 50 and 100 units. None where it is
    none of these: too high a correlation, too like classes, or too few draws.
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
    """Intraclass correlation of calls [n, k] of groups with known class [n] (or −1).

    The ANOVA estimator on the indicators of the k calls, components of variance pooled
    over the true classes: a within and b between groups make b / (a + b). 0 where calls
    vary less between groups than by chance; None where it is unknown (no class with two
    groups and a group of two units, or no call differs).
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
