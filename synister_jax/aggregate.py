# SPDX-License-Identifier: Apache-2.0
"""From synapses to neurons, hemilineages, cell types and brain regions.

    python -m synister_jax.aggregate --predictions=DIR/predictions.feather \
        --by=neuron --rule=majority --output=neurons.feather
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import flags

from synister_jax import command, files, predictions
from synister_jax.command import UserError

COLUMNS = {
    "neuron": "neuron_id",
    "hemilineage": "hemilineage",
    "cell_type": "cell_type",
    "brain_region": "brain_region",
}
# The only rule so far: the class that most synapses are called, ties to the first
# class, as in the published table of neurons (skeleton_predictions.csv).
MAJORITY = "majority"


def majority(table: pa.Table, by: str) -> pa.Table:
    """Calls each group of a prediction table by majority vote of its synapses.

    One row a group, in ascending order: the group's column, `synapses` (all rows),
    `predicted` (rows with a prediction, the only ones that vote), `count_<class>`,
    `predicted_neurotransmitter` and `winning_fraction` (of `predicted`; both null
    where nothing was predicted), `neurotransmitter` (the known one, when the group's
    rows name exactly one) and `rule`. Rows that belong to no group are not counted.
    """
    column = COLUMNS[by]
    classes = predictions.classes(table)
    member = pc.is_valid(table[column])
    groups = table[column].filter(member).combine_chunks()
    names = pc.unique(groups)
    names = names.take(pc.sort_indices(names))
    group = pc.index_in(groups, value_set=names).to_numpy()
    called = predictions.called(table)[member.to_numpy()]
    counts = np.zeros((len(names), len(classes)), np.int64)
    np.add.at(counts, (group[called >= 0], called[called >= 0]), 1)
    predicted = counts.sum(axis=1)
    nothing = predicted == 0
    winner = counts.argmax(axis=1)  # argmax takes the first of equals
    fraction = counts.max(axis=1) / np.maximum(predicted, 1)
    columns = {
        column: names,
        "synapses": np.bincount(group, minlength=len(names)),
        "predicted": predicted,
    }
    for index, name in enumerate(classes):
        columns[f"count_{name}"] = counts[:, index]
    winners = pa.array(np.asarray(classes)[winner], mask=nothing)
    columns["predicted_neurotransmitter"] = winners
    columns["winning_fraction"] = pa.array(fraction, mask=nothing)
    known = table["neurotransmitter"].filter(member)
    columns["neurotransmitter"] = _only_value(known, group, len(names))
    columns["rule"] = pa.array([MAJORITY] * len(names), pa.string())
    return pa.table(columns).replace_schema_metadata(table.schema.metadata)


def _only_value(values: pa.ChunkedArray, group: np.ndarray, groups: int) -> pa.Array:
    pairs = pa.table({"group": group, "value": values}).filter(
        pc.field("value").is_valid()
    )
    distinct = pairs.group_by(["group", "value"]).aggregate([])
    names: list[str | None] = [None] * groups
    seen = np.bincount(distinct["group"].to_numpy(), minlength=groups)
    for row in distinct.to_pylist():
        if seen[row["group"]] == 1:
            names[row["group"]] = row["value"]
    return pa.array(names, pa.string())


def main() -> None:
    source = flags.DEFINE_string("predictions", None, "Feather of predictions.")
    by = flags.DEFINE_enum("by", "neuron", list(COLUMNS), "What to call.")
    flags.DEFINE_enum("rule", MAJORITY, [MAJORITY], "How to call it.")
    output = flags.DEFINE_string("output", None, "Feather to write.")
    flags.mark_flags_as_required(["predictions", "output"])

    def aggregate() -> None:
        table = predictions.load(source.value)
        if table[COLUMNS[by.value]].null_count == len(table):
            raise UserError(
                f"{source.value} names no {by.value} ({COLUMNS[by.value]} is empty)"
            )
        groups = majority(table, by.value)
        files.write_feather(output.value, groups)
        print(f"{output.value}: {len(groups):,} rows from {len(table):,} synapses")

    command.run(aggregate)


if __name__ == "__main__":
    main()
