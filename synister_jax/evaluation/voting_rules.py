# SPDX-License-Identifier: Apache-2.0
"""The voting rules of the field, which call the transmitter of a group of synapses.

Every rule turns the tally of a group into a distribution over the classes. Except with
`flyem`, the winner is the first class with the largest entry. docs/evaluation.md says
who uses which rule.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from synister_jax.base.errors import UserError
from synister_jax.evaluation.confusions import Confusion
from synister_jax.evaluation.vote_tallies import WEIGHT, Tally

UNCLEAR = "unclear"
_NEED_CONFUSION = ("flyem", "conf_nt")
# FlyEM's thresholds (janelia-flyem/flyem-snapshot, inputs/neurotransmitters.py).
FLYEM_SYNAPSES, FLYEM_TYPE_SYNAPSES, FLYEM_CONFIDENCE = 50, 100, 0.5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The calls of n groups; rows of groups without predictions have no meaning."""

    distribution: np.ndarray  # float64 [n, k]
    winner: np.ndarray  # int [n], index of the class
    score: np.ndarray  # float64 [n], the rule's own score; NaN where it is undefined
    unclear: np.ndarray  # bool [n], True where the rule makes no call


def _largest(distribution: np.ndarray) -> Verdict:
    """Returns the verdict where the first largest entry wins and is the score."""
    winner = np.where(np.isnan(distribution), -1, distribution).argmax(axis=1)
    score = np.take_along_axis(distribution, winner[:, None], axis=1)[:, 0]
    return Verdict(distribution, winner, score, np.zeros(len(winner), bool))


def _shares(sums: np.ndarray) -> np.ndarray:
    total = sums.sum(axis=1, keepdims=True)
    return sums / np.where(total > 0, total, np.nan)


def majority(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """Calls the class that most synapses are called; the score is its share.

    On a tie, the first class wins. The published table of neurons uses this rule
    (skeleton_predictions.csv; evaluate.py, `skeleton_confusion_matrix`).
    """
    return _largest(_shares(tally.counts))


def mean_probability(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """Calls the class with the largest mean probability, which is the score.

    This rule is used by Schlegel et al. 2024 (`top_nt_conf`), by Codex
    (`nt_type_score`) and by MANC in neuPrint (`predictedNtProb`).
    """
    return _largest(tally.mean)


def cleft_weighted(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """Calls the class with the largest mean probability, weighted by the cleft scores.

    fafbseg-py uses this rule (`collapse_nt_predictions`). A group whose weights sum to
    zero has no call.
    """
    assert tally.weighted is not None  # `require` has refused tallies without weights.
    return _largest(tally.weighted)


def flyem(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """Calls the class that most synapses are called, with the confidence of FlyEM.

    On a tie, the first name in the alphabet wins. The score is FlyEM's confidence, the
    mean over the synapses of P(call of the synapse | call of the group is true). These
    probabilities are the rows of the confusion.

    A neuron is unclear if it has fewer than `FLYEM_SYNAPSES` predicted synapses, or a
    score below `FLYEM_CONFIDENCE`. Another group is unclear if it has fewer than
    `FLYEM_TYPE_SYNAPSES` predicted synapses. If such a group is only one neuron,
    `FLYEM_SYNAPSES` is used instead. The source of the rule is flyem-snapshot; neuPrint
    uses the rule for the optic lobe and the male CNS.
    """
    assert confusion is not None  # `require` has refused a missing confusion.
    confusion.require_rows()
    rows = confusion.by_row()
    distribution = _shares(tally.counts)
    by_name = np.argsort(tally.classes)
    winner = by_name[tally.counts[:, by_name].argmax(axis=1)]
    score = (distribution * rows[winner]).sum(axis=1)
    if tally.by == "neuron":
        unclear = (tally.predicted < FLYEM_SYNAPSES) | ~(score >= FLYEM_CONFIDENCE)
    else:
        one = tally.groups["neurons"].to_numpy() == 1
        least = np.where(one, FLYEM_SYNAPSES, FLYEM_TYPE_SYNAPSES)
        unclear = tally.predicted < least
    return Verdict(distribution, winner, score, unclear)


def conf_nt(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """Calls the class with the largest mean of P(true class | call of the synapse).

    The mean is the score. The columns of the confusion give these probabilities, as do
    the matrices that hemibrainr publishes with `conf_nt` (Eckstein et al. 2024). No
    published code shows whether `conf_nt` was computed with exactly this formula.

    A class that the confusion never calls contributes nothing. A group whose synapses
    are all called such a class has no call.
    """
    assert confusion is not None  # `require` has refused a missing confusion.
    worth = _shares(tally.counts) @ np.nan_to_num(confusion.by_column()).T
    return _largest(np.where(worth.any(axis=1, keepdims=True), worth, np.nan))


def banc(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """Calls the class with the largest sum of highest probabilities.

    Each synapse adds its highest probability to the class that it is called, as in the
    R code of BANC. The score is the share of the class in the sum over all classes.
    """
    return _largest(_shares(tally.top))


def require(rule: str, weighted: bool, confusion: Confusion | None) -> None:
    """Checks that a rule of `RULES` has the inputs that it needs.

    Args:
      weighted: whether the predictions have cleft scores.

    Raises:
      UserError: the rule needs a confusion or cleft scores that are not given.
    """
    if rule in _NEED_CONFUSION and confusion is None:
        raise UserError(
            f"the rule {rule} needs the network's confusion: give --confusion="
            "RUN/evaluation/test"
        )
    if rule == "cleft_weighted" and not weighted:
        raise UserError(
            f"the rule cleft_weighted needs the column {WEIGHT}, which these "
            "predictions do not have; predict a synapse table that has it"
        )


RULES: dict[str, Callable[[Tally, Confusion | None], Verdict]] = {
    rule.__name__: rule
    for rule in (majority, mean_probability, cleft_weighted, flyem, conf_nt, banc)
}
