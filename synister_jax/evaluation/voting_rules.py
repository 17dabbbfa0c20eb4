# SPDX-License-Identifier: Apache-2.0
"""How a group of synapses is called: the field's rules, each under a name.

Every rule makes a distribution over the classes out of a group's tally; the winner is
its largest entry. Who uses which is in docs/evaluation.md.
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
    """Of n groups; the rows of those where nothing was predicted do not matter."""

    distribution: np.ndarray  # float64 [n, k]
    winner: np.ndarray  # int [n]
    score: np.ndarray  # float64 [n], the rule's own number; NaN where undefined
    unclear: np.ndarray  # bool [n], the rule refuses to say


def _largest(distribution: np.ndarray) -> Verdict:
    """The first of the largest entries wins, and is the score."""
    winner = np.where(np.isnan(distribution), -1, distribution).argmax(axis=1)
    score = np.take_along_axis(distribution, winner[:, None], axis=1)[:, 0]
    return Verdict(distribution, winner, score, np.zeros(len(winner), bool))


def _shares(sums: np.ndarray) -> np.ndarray:
    total = sums.sum(axis=1, keepdims=True)
    return sums / np.where(total > 0, total, np.nan)


def majority(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """The class most synapses are called; ties to the first class; score: its share.

    The published table of neurons (skeleton_predictions.csv; evaluate.py,
    `skeleton_confusion_matrix`).
    """
    return _largest(_shares(tally.counts))


def mean_probability(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """The class of the largest mean probability, which is the score.

    Schlegel et al. 2024 (`top_nt_conf`), Codex (`nt_type_score`), MANC in neuPrint
    (`predictedNtProb`).
    """
    return _largest(tally.mean)


def cleft_weighted(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """As `mean_probability`, each synapse weighted by its cleft score.

    fafbseg-py (`collapse_nt_predictions`). Without a call where the weights of a group
    sum to zero.
    """
    assert tally.weighted is not None  # `require` has refused it
    return _largest(tally.weighted)


def flyem(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """The class most synapses are called; ties to the first name in the alphabet.

    The score is FlyEM's confidence: the mean over the group's synapses of
    P(called as the synapse | truly as the group), of the confusion's rows. Neurons are
    unclear below `FLYEM_SYNAPSES` predicted synapses or `FLYEM_CONFIDENCE`, other
    groups, by their synapses alone, below `FLYEM_TYPE_SYNAPSES`, or `FLYEM_SYNAPSES`
    where they are one neuron (flyem-snapshot; optic lobe and male CNS in neuPrint).
    """
    assert confusion is not None  # `require` has refused it
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
    """The class of the largest mean of P(true | called as the synapse), the score.

    The columns of the confusion say what a call is worth, as in the matrices that
    hemibrainr keeps beside the published `conf_nt` (Eckstein et al. 2024); whether that
    was made with this very formula is not published in code. A class that was never
    called in the confusion is worth nothing: a group of its calls alone has no call.
    """
    assert confusion is not None  # `require` has refused it
    worth = _shares(tally.counts) @ np.nan_to_num(confusion.by_column()).T
    return _largest(np.where(worth.any(axis=1, keepdims=True), worth, np.nan))


def banc(tally: Tally, confusion: Confusion | None = None) -> Verdict:
    """The class with the largest sum of highest probabilities; score: its share.

    Synapses add the probability of the class that they are called (BANC's R code).
    """
    return _largest(_shares(tally.top))


def require(rule: str, weighted: bool, confusion: Confusion | None) -> None:
    """Raises `UserError` where a rule of `RULES` lacks what it needs.

    Args:
      weighted: there are cleft scores.
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
