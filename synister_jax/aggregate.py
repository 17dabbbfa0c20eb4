# SPDX-License-Identifier: Apache-2.0
r"""Calls neurons, hemilineages, cell types or brain regions from their synapses.

    python -m synister_jax.aggregate --predictions=DIR/predictions.feather \
        --by=neuron --rule=majority,mean_probability --output=neurons.feather
    python -m synister_jax.aggregate … --rule=flyem \
        --confusion=RUN/evaluation/test/step-<n>/metrics.json

The command writes one row for each group and rule, however many synapses the group has.
The groups are in ascending order. docs/evaluation.md explains the rules.
"""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from absl import flags

from synister_jax.base import command, files, table_metadata
from synister_jax.base.errors import UserError
from synister_jax.evaluation import confusions, group_calls, vote_tallies, voting_rules
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions
from synister_jax.tables.synapses import GROUP_COLUMNS


def threshold(text: str, source: Predictions) -> float:
    """Returns the value of --min_probability, from 0 to 1.

    `calibrated` stands for the confidence that `predict --calibrated` kept in the
    table.

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
            f"{source.path} has no threshold for `calibrated`: give a number, or "
            "predict with --calibrated"
        )
    value = source.about["abstain_below"]
    if value is None:
        raise UserError(
            f"{source.path} has no threshold: on the validation part, no threshold "
            "reached the --precision of `calibrate`; give a number, or calibrate with "
            "a lower --precision"
        )
    return value


def main() -> None:
    path = flags.DEFINE_string(
        "predictions",
        None,
        "Read these predictions: a Feather file, or a folder of Parquet files.",
        required=True,
    )
    by_ = flags.DEFINE_enum(
        "by",
        "neuron",
        list(GROUP_COLUMNS),
        "Group the synapses by this, and call every group.",
    )
    rule_names = flags.DEFINE_list(
        "rule",
        ["majority"],
        "Call every group by these rules, separated by commas: "
        f"{', '.join(voting_rules.RULES)}.",
    )
    confusion = flags.DEFINE_string(
        "confusion",
        None,
        "Give this confusion matrix to the rules that need one: metrics.json of the "
        "test part, its folder RUN/evaluation/test, or a CSV whose rows are the true "
        "classes.",
    )
    min_probability = flags.DEFINE_string(
        "min_probability",
        "0",
        "Do not count synapses whose highest probability is lower than this number. "
        "`calibrated` stands for the threshold that predict --calibrated saved in the "
        "table.",
    )
    output = flags.DEFINE_string(
        "output",
        None,
        "Write the calls into this file, NAME.feather or NAME.parquet.",
        required=True,
    )

    def aggregate() -> None:
        names = list(dict.fromkeys(rule_names.value))
        unknown = sorted({*names} - {*voting_rules.RULES})
        if unknown or not names:
            raise UserError(
                f"--rule={','.join(names)}: no rule {', '.join(unknown)}; "
                f"there are {', '.join(voting_rules.RULES)}"
            )
        synapses.check_writable(output.value)
        files.require_other(output.value, path.value)
        matrix = None if confusion.value is None else confusions.load(confusion.value)
        source = predictions.open(path.value)
        if matrix is not None:
            matrix = matrix.for_classes(source.classes)
        for name in names:
            voting_rules.require(
                name, vote_tallies.WEIGHT in source.schema.names, matrix
            )
        least = threshold(min_probability.value, source)
        with files.scratch(output.value) as folder:
            added = vote_tallies.of(source, by_.value, folder, least)
        tables = [group_calls.call(added, name, matrix) for name in names]
        table = group_calls.interleaved(tables)
        about = {
            **predictions.about(tables[0]),
            "rules": {name: _first_line(voting_rules.RULES[name]) for name in names},
            "min_probability": least,
            "confusion": None if matrix is None else matrix.name,
            "predictions": {"path": str(source.path)} | source.about,
        }
        synapses.write(
            table_metadata.described(table, about),
            output.value,
        )
        print(f"{output.value}: {len(added.groups):,} groups from {source.rows:,} rows")
        for name, each in zip(names, tables, strict=True):
            print(f"  {name}: {_summary(each)}")

    command.run(aggregate)


def _first_line(rule: Callable[..., Any]) -> str:
    return (rule.__doc__ or "").split("\n")[0]


def _summary(table: pa.Table) -> str:
    counts = table["predicted_neurotransmitter"].value_counts().to_pylist()
    counts.sort(key=lambda entry: -entry["counts"])
    shown = [f"{e['counts']:,} {e['values'] or 'without a call'}" for e in counts]
    return ", ".join(shown)


if __name__ == "__main__":
    main()
