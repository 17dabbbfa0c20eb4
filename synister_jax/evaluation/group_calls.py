# SPDX-License-Identifier: Apache-2.0
"""Calls neurons, hemilineages, cell types and brain regions by a voting rule.

`vote_tallies` adds up the synapses of each group, and `voting_rules` has the rules.
This module combines both into a table with one row for each group.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from synister_jax.base import table_metadata
from synister_jax.evaluation import vote_tallies, voting_rules
from synister_jax.evaluation.confusions import Confusion
from synister_jax.evaluation.vote_tallies import Tally
from synister_jax.tables.predictions import Predictions


def call(tally: Tally, rule: str, confusion: Confusion | None = None) -> pa.Table:
    """Calls each group of a tally.

    Args:
      tally: the sums of the groups.
      rule: a name of `voting_rules.RULES`.
      confusion: the confusion of the network, for the rules that need it.

    Returns:
      A table with one row for each group and these columns:
        the columns of `tally.groups`;
        `count_<class>`: the votes for the class;
        `mean_<class>_prob`: the mean probability of the class;
        `predicted_neurotransmitter`: the call; null where the rule has no distribution,
          and `unclear` where the rule makes no call;
        `score`: the score of the rule;
        `margin`: the lead of the winner in the distribution of the rule;
        `entropy`: the entropy of this distribution, in bits;
        `rule`: the name of the rule.

    Raises:
      UserError: a confusion or cleft scores that the rule needs are missing, or the
        confusion has other classes.
    """
    voting_rules.require(rule, tally.weighted is not None, confusion)
    if confusion is not None:
        confusion = confusion.for_classes(tally.classes)
    verdict = voting_rules.RULES[rule](tally, confusion)
    # The distribution is NaN where no synapse has a prediction, where the weights sum
    # to zero, or where the confusion never calls the classes of the synapses.
    none = np.isnan(verdict.distribution).any(axis=1)
    names = np.array([*tally.classes, voting_rules.UNCLEAR])
    winner = np.where(verdict.unclear, len(tally.classes), verdict.winner)
    table = tally.groups
    for index, name in enumerate(tally.classes):
        table = table.append_column(f"count_{name}", pa.array(tally.counts[:, index]))
    for index, name in enumerate(tally.classes):
        mean = tally.mean[:, index]
        table = table.append_column(
            f"mean_{name}_prob", pa.array(mean, mask=np.isnan(mean))
        )
    called = pa.array(names[winner], pa.string(), mask=none)
    table = table.append_column("predicted_neurotransmitter", called)
    numbers = {
        "score": verdict.score,
        "margin": _margin(verdict),
        "entropy": _entropy(verdict.distribution),
    }
    for name, values in numbers.items():
        column = pa.array(values, mask=none | np.isnan(values))
        table = table.append_column(name, column)
    table = table.append_column("rule", pa.array([rule] * len(table), pa.string()))
    about = {"classes": list(tally.classes), "by": tally.by}
    return table_metadata.described(table, about)


def of(
    source: Predictions,
    by: str,
    rule: str = "majority",
    confusion: Confusion | None = None,
    folder: pathlib.Path | None = None,
) -> pa.Table:
    """Calls each group of a prediction table of any size.

    Args:
      source: the predictions.
      by: the kind of the groups, a key of `GROUP_COLUMNS`.
      rule: a name of `voting_rules.RULES`.
      confusion: the confusion of the network, for the rules that need it.
      folder: a folder on a disk with room for the groups that do not fit into memory.

    Returns:
      The table that `call` returns.

    Raises:
      UserError: no row names a group, or a confusion or cleft scores that the rule
        needs are missing.
    """
    voting_rules.require(rule, vote_tallies.WEIGHT in source.schema.names, confusion)
    return call(vote_tallies.of(source, by, folder), rule, confusion)


def interleaved(tables: Sequence[pa.Table]) -> pa.Table:
    """Joins tables of the same groups so that all rows of a group are together.

    Each table has the calls of another rule, and all have the groups in equal order.
    """
    n = len(tables[0])
    order = np.arange(n * len(tables)).reshape(len(tables), n).T.ravel()
    return pa.concat_tables(tables).take(pa.array(order))


def _margin(verdict: voting_rules.Verdict) -> np.ndarray:
    others = verdict.distribution.copy()
    place = verdict.winner[:, None]
    first = np.take_along_axis(others, place, axis=1)[:, 0]
    np.put_along_axis(others, place, 0, axis=1)  # no entry is below 0
    return first - others.max(axis=1)


def _entropy(distribution: np.ndarray) -> np.ndarray:
    total = distribution.sum(axis=1, keepdims=True)
    share = distribution / np.where(total > 0, total, np.nan)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=1) + 0.0
