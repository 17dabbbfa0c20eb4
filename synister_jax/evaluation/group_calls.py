# SPDX-License-Identifier: Apache-2.0
"""Calls of neurons, hemilineages, cell types and brain regions, under a rule.

`vote_tallies` adds up the synapses of each group, `voting_rules` says how a group is
called; here the two become a table with one row a group.
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

    Columns: those of `tally.groups`; `count_<class>`, the votes; `mean_<class>_prob`;
    `predicted_neurotransmitter`, null where nothing was predicted, `unclear` where the
    rule says so; `score`, the rule's number; of the rule's distribution over the
    classes `margin`, by which the winner leads, and `entropy` in bits; `rule`.

    Args:
      rule: of `voting_rules.RULES`.
      confusion: of the network, for the rules that need it.

    Raises:
      UserError: what the rule needs is not there.
    """
    voting_rules.require(rule, tally.weighted is not None, confusion)
    if confusion is not None:
        confusion = confusion.for_classes(tally.classes)
    verdict = voting_rules.RULES[rule](tally, confusion)
    # Nothing predicted, or weights that sum to zero.
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
    """`call` of each group of a prediction table of any size.

    Raises:
      UserError: no row names a group; what the rule needs is not there.
    """
    voting_rules.require(rule, vote_tallies.WEIGHT in source.schema.names, confusion)
    return call(vote_tallies.of(source, by, folder), rule, confusion)


def interleaved(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of the same groups under several rules, the rows of a group together."""
    n = len(tables[0])
    order = np.arange(n * len(tables)).reshape(len(tables), n).T.ravel()
    return pa.concat_tables(tables).take(pa.array(order))


def _margin(verdict: voting_rules.Verdict) -> np.ndarray:
    others = verdict.distribution.copy()
    place = verdict.winner[:, None]
    first = np.take_along_axis(others, place, axis=1)[:, 0]
    np.put_along_axis(others, place, 0, axis=1)  # none is less
    return first - others.max(axis=1)


def _entropy(distribution: np.ndarray) -> np.ndarray:
    total = distribution.sum(axis=1, keepdims=True)
    share = distribution / np.where(total > 0, total, np.nan)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=1) + 0.0
