# SPDX-License-Identifier: Apache-2.0
"""From synapses to neurons, hemilineages, cell types and brain regions.

    python -m synister_jax.aggregate --predictions=DIR/predictions.feather \
        --by=neuron --rule=majority,mean_probability --output=neurons.feather
    python -m synister_jax.aggregate … --rule=flyem \
        --confusion=RUN/evaluation/test/step-<n>/metrics.json

One row a group and rule, whatever the number of synapses; groups in ascending order.
The rules are those of `rules.py`.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from absl import flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.evaluation import confusions, rules, tallies
from synister_jax.evaluation.confusions import Confusion
from synister_jax.evaluation.tallies import COLUMNS, Tally
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions


def call(tally: Tally, rule: str, confusion: Confusion | None = None) -> pa.Table:
    """Calls each group of a tally.

    Columns: those of `tally.groups`; `count_<class>`, the votes; `mean_<class>_prob`;
    `predicted_neurotransmitter`, null where nothing was predicted, `unclear` where the
    rule says so; `score`, the rule's number; of the rule's distribution over the
    classes `margin`, by which the winner leads, and `entropy` in bits; `rule`.

    Args:
      rule: of `rules.RULES`.
      confusion: of the network, for the rules that need it.

    Raises:
      UserError: what the rule needs is not there.
    """
    rules.require(rule, tally.weighted is not None, confusion)
    if confusion is not None:
        confusion = confusion.for_classes(tally.classes)
    verdict = rules.RULES[rule](tally, confusion)
    # Nothing predicted, or weights that sum to zero.
    none = np.isnan(verdict.distribution).any(axis=1)
    names = np.array([*tally.classes, rules.UNCLEAR])
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
    return table.replace_schema_metadata({"synister_jax": json.dumps(about)})


def _margin(verdict: rules.Verdict) -> np.ndarray:
    others = verdict.distribution.copy()
    place = verdict.winner[:, None]
    first = np.take_along_axis(others, place, axis=1)[:, 0]
    np.put_along_axis(others, place, 0, axis=1)  # none is less
    return first - others.max(axis=1)


def _entropy(distribution: np.ndarray) -> np.ndarray:
    total = distribution.sum(axis=1, keepdims=True)
    share = distribution / np.where(total > 0, total, np.nan)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=1) + 0.0


def tally(
    source: Predictions,
    by: str,
    folder: pathlib.Path | None = None,
    min_probability: float = 0.0,
) -> Tally:
    """Adds up a prediction table of any size.

    Raises:
      UserError: no row names a group.
    """
    names = tallies.columns_needed(source.schema.names, source.classes, by)
    progress = Progress("aggregate", source.rows, "synapses")

    def tables() -> Iterator[pa.Table]:
        for table in source.tables(names):
            yield table
            progress.add(len(table))

    found = tallies.count(tables(), source.classes, by, folder, min_probability)
    if not len(found.groups):
        raise UserError(
            f"{source.path} names no {by.replace('_', ' ')}: its column {COLUMNS[by]} "
            "is empty"
        )
    return found


def by(
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
    rules.require(rule, tallies.WEIGHT in source.schema.names, confusion)
    return call(tally(source, by, folder), rule, confusion)


def threshold(text: str, source: Predictions) -> float:
    """The value of --min_probability: a number, or that of `predict --calibrated`.

    Raises:
      UserError: neither; the predictions have none.
    """
    if text != "calibrated":
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise UserError(
                f"--min_probability={text}: give a number from 0 to 1, or `calibrated`"
            )
        return value
    if "abstain_below" not in source.about:
        raise UserError(
            f"{source.path} has no threshold of its own: predict with --calibrated"
        )
    value = source.about["abstain_below"]
    if value is None:
        raise UserError(
            f"{source.path}: on validation no threshold was as precise as `calibrate` "
            "was asked for; give a number, or calibrate with a lower --precision"
        )
    return value


def main() -> None:
    path = flags.DEFINE_string("predictions", None, "Prediction table.")
    by_ = flags.DEFINE_enum("by", "neuron", list(COLUMNS), "What to call.")
    rule_names = flags.DEFINE_list(
        "rule", ["majority"], f"How to call it: of {', '.join(rules.RULES)}."
    )
    confusion = flags.DEFINE_string(
        "confusion", None, "metrics.json of the test part, or CSV (rows true)."
    )
    min_probability = flags.DEFINE_string(
        "min_probability",
        "0",
        "Synapses of a lower highest probability do not count: a number, or "
        "`calibrated` for the threshold that predict --calibrated left.",
    )
    output = flags.DEFINE_string("output", None, "Feather or Parquet to write.")
    flags.mark_flags_as_required(["predictions", "output"])

    def aggregate() -> None:
        names = list(dict.fromkeys(rule_names.value))
        unknown = sorted({*names} - {*rules.RULES})
        if unknown or not names:
            raise UserError(
                f"--rule={','.join(names)}: no rule {', '.join(unknown)}; "
                f"there are {', '.join(rules.RULES)}"
            )
        synapses.check_writable(output.value)
        files.require_other(output.value, path.value)
        matrix = None if confusion.value is None else confusions.load(confusion.value)
        source = predictions.open(path.value)
        if matrix is not None:
            matrix = matrix.for_classes(source.classes)
        for name in names:
            rules.require(name, tallies.WEIGHT in source.schema.names, matrix)
        least = threshold(min_probability.value, source)
        with files.scratch(output.value) as folder:
            added = tally(source, by_.value, folder, least)
        tables = [call(added, name, matrix) for name in names]
        table = in_groups(tables)
        about = {
            **predictions.about(tables[0]),
            "rules": {name: rules.RULES[name].__doc__.split("\n")[0] for name in names},
            "min_probability": least,
            "confusion": None if matrix is None else matrix.name,
            "predictions": {"path": str(source.path)} | source.about,
        }
        synapses.write(
            table.replace_schema_metadata({"synister_jax": json.dumps(about)}),
            output.value,
        )
        print(f"{output.value}: {len(added.groups):,} groups from {source.rows:,} rows")
        for name, each in zip(names, tables, strict=True):
            print(f"  {name}: {_summary(each)}")

    command.run(aggregate)


def in_groups(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of the same groups under several rules, the rows of a group together."""
    n = len(tables[0])
    order = np.arange(n * len(tables)).reshape(len(tables), n).T.ravel()
    return pa.concat_tables(tables).take(pa.array(order))


def _summary(table: pa.Table) -> str:
    counts = table["predicted_neurotransmitter"].value_counts().to_pylist()
    counts.sort(key=lambda entry: -entry["counts"])
    shown = [f"{e['counts']:,} {e['values'] or 'without a call'}" for e in counts]
    return ", ".join(shown)


if __name__ == "__main__":
    main()
