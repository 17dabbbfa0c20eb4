# SPDX-License-Identifier: Apache-2.0
"""Adds up the predictions of the synapses of each group.

A group is a neuron, a hemilineage, a cell type or a brain region. The prediction table
can have any size and is read once. DuckDB holds the groups, and writes them to the disk
where they do not fit into memory.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base import sql
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.tables import predictions
from synister_jax.tables.predictions import Predictions
from synister_jax.tables.synapses import GROUP_COLUMNS

# For a neuron, the tally gives the value of these columns that all its synapses have.
_OF_NEURON = ("hemilineage", "cell_type")
WEIGHT = "cleft_score"


@dataclasses.dataclass(frozen=True)
class Tally:
    """The sums over the synapses of n groups, in ascending order of the groups.

    The table `groups` has one row for each group, with these columns:
      the column of `GROUP_COLUMNS` that names the group;
      `synapses`: the number of all rows;
      `predicted`: the number of rows with a call, which are summed in the arrays;
      `neurons`: the number of different neurons;
      `neurotransmitter`: the known transmitter; null where there is none or several;
      `hemilineage` and `cell_type`, for neurons only; null where there is none or
        several.
    """

    by: str
    classes: tuple[str, ...]
    groups: pa.Table
    counts: np.ndarray  # int64 [n, k], synapses called each class
    mean: np.ndarray  # float64 [n, k], mean probability; NaN where `predicted` is 0
    # float64 [n, k], sum of the highest probabilities of the synapses called each class
    top: np.ndarray
    # float64 [n, k], mean probability weighted by the cleft scores. NaN where the
    # weights sum to zero; None where the predictions have no cleft scores.
    weighted: np.ndarray | None

    @property
    def predicted(self) -> np.ndarray:
        """The number of predicted synapses of each group, int64 [n]."""
        return self.groups["predicted"].to_numpy()


def of(
    source: Predictions,
    by: str,
    folder: pathlib.Path | None = None,
    min_probability: float = 0.0,
) -> Tally:
    """Adds up a prediction table of any size; see `count` for the arguments.

    Raises:
      UserError: no row names a group, a weight is negative or infinite, or the disk is
        full.
    """
    names = columns_needed(source.schema.names, source.classes, by)
    progress = Progress("aggregate", source.rows, "synapses")

    def tables() -> Iterator[pa.Table]:
        for table in source.tables(names):
            yield table
            progress.add(len(table))

    found = count(tables(), source.classes, by, folder, min_probability)
    if not len(found.groups):
        raise UserError(
            f"{source.path} names no {by.replace('_', ' ')}: its column "
            f"{GROUP_COLUMNS[by]} is empty; choose another kind of group"
        )
    return found


def count(
    tables: Iterable[pa.Table],
    classes: Sequence[str],
    by: str,
    folder: pathlib.Path | None = None,
    min_probability: float = 0.0,
) -> Tally:
    """Adds up the rows of `tables`, which are the pieces of one prediction table.

    Rows that belong to no group are left out. Rows without a prediction are counted
    only in `synapses`. Rows whose highest probability is below `min_probability` are
    also counted only in `synapses`.

    Args:
      by: a key of `GROUP_COLUMNS`.
      folder: a folder on a disk with room for the groups that do not fit into memory.

    Raises:
      UserError: a weight is negative or infinite, or the disk is full.
      ValueError: `tables` is empty.
    """
    tables = iter(tables)
    first = next(tables, None)
    if first is None:
        raise ValueError(
            "there are no tables: give at least one table, which can be empty"
        )
    weighted = WEIGHT in first.column_names
    schema = _schema(first.schema, classes, by, weighted)

    def batches() -> Iterator[pa.RecordBatch]:
        table: pa.Table | None = first
        while table is not None:
            yield _prepared(table, classes, schema, min_probability)
            table = next(tables, None)

    query = _query(schema, len(classes), by)
    # With a single thread, the sums of floats have the same bits in every run.
    found = pa.Table.from_batches(sql.run(query, schema, batches(), folder, 1))
    return _tally(found, tuple(classes), by, weighted)


def calls_of_neurons(
    neurons: Tally, by: str, least: int = 1
) -> tuple[pa.Array, np.ndarray]:
    """Counts the calls of the neurons in each hemilineage or cell type.

    A neuron is called the class that most of its synapses are called. On a tie, the
    first class wins. A neuron whose synapses name several groups, or no group, does not
    count.

    Args:
      neurons: the tally of neurons.
      by: "hemilineage" or "cell_type".
      least: neurons with fewer predicted synapses do not count.

    Returns:
      The groups in ascending order, and the numbers of their neurons that are called
      each class, int64 [n, k].
    """
    column = neurons.groups[GROUP_COLUMNS[by]].combine_chunks()
    names = pc.unique(column.drop_null())
    names = names.take(pc.sort_indices(names))
    group = pc.fill_null(pc.index_in(column, value_set=names), -1).to_numpy()
    there = (group >= 0) & (neurons.predicted >= max(least, 1))
    counts = np.zeros((len(names), len(neurons.classes)), np.int64)
    np.add.at(counts, (group[there], neurons.counts.argmax(axis=1)[there]), 1)
    return names, counts


def columns_needed(names: Sequence[str], classes: Sequence[str], by: str) -> list[str]:
    """Returns the columns among `names` that `count` reads from a prediction table."""
    wanted = ["neuron_id", "neurotransmitter", *GROUP_COLUMNS.values(), WEIGHT]
    if by != "neuron":
        wanted = ["neuron_id", "neurotransmitter", GROUP_COLUMNS[by], WEIGHT]
    wanted += map(predictions.probability_column, classes)
    return [name for name in dict.fromkeys(wanted) if name in names]


def _schema(
    table: pa.Schema, classes: Sequence[str], by: str, weighted: bool
) -> pa.Schema:
    names = [GROUP_COLUMNS[by], "neurotransmitter"]
    names += _OF_NEURON if by == "neuron" else ["neuron_id"]
    fields = [pa.field(name, table.field(name).type) for name in names]
    fields += [("called", pa.int8()), ("top", pa.float32())]
    fields += [(f"p{i}", pa.float32()) for i in range(len(classes))]
    fields += [("weight", pa.float32())] if weighted else []
    return pa.schema(fields)


def _prepared(
    table: pa.Table, classes: Sequence[str], schema: pa.Schema, min_probability: float
) -> pa.RecordBatch:
    """Returns the rows with their calls.

    Rows without a call have the call -1, and 0 in all columns of numbers.
    """
    names = [predictions.probability_column(name) for name in classes]
    values = np.stack([table[name].to_numpy() for name in names], axis=1)
    called = predictions.called_of(values)
    top = np.where(called >= 0, values.max(axis=1), 0)
    called[top < min_probability] = -1
    values[called < 0] = 0
    columns = {"called": called.astype(np.int8), "top": top}
    columns |= {f"p{i}": np.ascontiguousarray(v) for i, v in enumerate(values.T)}
    if "weight" in schema.names:
        columns["weight"] = np.where(called < 0, 0, weights(table))
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else table[field.name].combine_chunks()
        for field in schema
    ]
    return pa.record_batch(arrays, schema)


def weights(table: pa.Table) -> np.ndarray:
    """Returns the cleft scores, float32 [n], with 0 where a score is unknown.

    Raises:
      UserError: a cleft score is negative or infinite.
    """
    found = pc.fill_null(table[WEIGHT], 0).to_numpy().astype(np.float32)
    if (wrong := (found < 0) | np.isinf(found)).any():
        raise UserError(
            f"{WEIGHT} is {found[wrong][0]} in a row of the table; correct the column: "
            "its values must be finite and not negative"
        )
    return np.nan_to_num(found)


def _query(schema: pa.Schema, classes: int, by: str) -> str:
    group = GROUP_COLUMNS[by]
    terms = [group, "count(*) AS synapses"]
    terms += ["count(*) FILTER (called >= 0) AS predicted"]
    terms += ["1 AS neurons" if by == "neuron" else "count(DISTINCT neuron_id) neurons"]
    only = ["neurotransmitter", *(_OF_NEURON if by == "neuron" else ())]
    terms += [f"CASE WHEN min({n}) = max({n}) THEN min({n}) END AS {n}" for n in only]
    for i in range(classes):
        terms.append(f"count(*) FILTER (called = {i}) AS count{i}")
        terms.append(f"sum(p{i}) AS sum{i}")
        terms.append(f"coalesce(sum(top) FILTER (called = {i}), 0) AS top{i}")
    if "weight" in schema.names:
        terms.append("sum(weight) AS weight")
        terms += [f"sum(weight * p{i}) AS weighted{i}" for i in range(classes)]
    return f"""SELECT {", ".join(terms)} FROM rows
        WHERE {group} IS NOT NULL GROUP BY {group} ORDER BY {group}"""


def _tally(found: pa.Table, classes: tuple[str, ...], by: str, weighted: bool) -> Tally:
    def numbers(name: str) -> np.ndarray:
        columns = [found[f"{name}{i}"].to_numpy() for i in range(len(classes))]
        return np.stack(columns, axis=1)

    def mean(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
        weights = np.where(weights > 0, weights, np.nan)
        return sums / weights[:, None]

    names = [GROUP_COLUMNS[by], "synapses", "predicted", "neurons", "neurotransmitter"]
    names += _OF_NEURON if by == "neuron" else ()
    groups = found.select(names)
    for name in ("synapses", "predicted", "neurons"):
        place = groups.schema.get_field_index(name)
        groups = groups.set_column(place, name, groups[name].cast(pa.int64()))
    return Tally(
        by,
        classes,
        groups,
        numbers("count").astype(np.int64),
        mean(numbers("sum"), found["predicted"].to_numpy()),
        numbers("top"),
        mean(numbers("weighted"), found["weight"].to_numpy()) if weighted else None,
    )
