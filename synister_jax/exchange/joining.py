# SPDX-License-Identifier: Apache-2.0
"""Finds the rows that two tables of predictions have in common.

The rows of both tables are sorted together, on disk where memory does not suffice. Rows
with the same key then follow one another, so tables of any size can be joined.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.base import sql
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.exchange.published import Published
from synister_jax.tables import synapses

_EXAMPLES = 3
_GRID = ("grid_z", "grid_y", "grid_x")
_MOST = 2.0**63  # int64
KEYS = {"id": ("id",), "position": _GRID}


@dataclasses.dataclass
class Side:
    """One of the two tables, and the counts of its rows.

    The counts are complete when all pairs have been read.
    """

    source: Published
    rows: int = 0
    without_key: int = 0  # no id, or no position
    with_neuron: int = 0  # complete as soon as the first pairs are there
    duplicates: int = 0  # rows with the key of an earlier row; they are left out
    duplicate_examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    alone: int = 0  # rows whose key the other table lacks
    alone_examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lowest_nm_zyx: np.ndarray = dataclasses.field(
        default_factory=lambda: np.full(3, np.inf)
    )
    highest_nm_zyx: np.ndarray = dataclasses.field(
        default_factory=lambda: np.full(3, -np.inf)
    )


def pairs(
    a: Side,
    b: Side,
    by: str,
    grid_nm_zyx: Sequence[float],
    classes: Sequence[str],
    folder: pathlib.Path,
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yields the rows of `a` and of `b` that have the same key, sorted by key.

    The two tables of a pair have equal length, and their rows correspond. Each table
    has the columns `id`, `z_nm`, `y_nm`, `x_nm`, `neuron_id` and the `classes`. A class
    that a side lacks is NaN. If several rows of a side have the same key, the first of
    these rows is used.

    Args:
      a: the first table; its counts are updated.
      b: the second table; its counts are updated.
      by: "id", or "position". Two positions are the same if they round to the same
        point of the grid.
      grid_nm_zyx: [3] nm, the spacing of the grid.
      classes: the classes of `a` and of `b` together.
      folder: a folder for temporary files; its disk must have room for both tables.

    Raises:
      UserError: A table cannot be read. The grid is so fine that its points have no
        int64 numbers. The disk is full.
    """
    keys = KEYS[by]
    # A class can have any name, also the name of another column ("row").
    numbered = [f"p{i}" for i in range(len(classes))]
    schema = pa.schema(
        [
            *((name, pa.int64()) for name in _GRID if by == "position"),
            ("side", pa.int8()),
            ("row", pa.int64()),
            ("id", pa.int64()),
            *((name, pa.float64()) for name in synapses.POSITION),
            ("neuron_id", pa.int64()),
            *((name, pa.float32()) for name in numbered),
        ]
    )
    both = (
        batch
        for number, side in enumerate((a, b))
        for batch in _rows(side, number, keys, grid_nm_zyx, classes, schema)
    )
    query = f'SELECT * FROM rows ORDER BY {", ".join(keys)}, side, "row"'
    result = ["id", *synapses.POSITION, "neuron_id", *numbered]
    names = [*result[:5], *classes]
    for table in _deduplicated(sql.run(query, schema, both, folder), keys, (a, b)):
        in_b = table["side"].to_numpy() == 1
        second = ~_starts(table, keys)
        _count_alone(table, second, in_b, (a, b))
        at = np.flatnonzero(second)
        left = table.take(pa.array(at - 1)).select(result).rename_columns(names)
        right = table.take(pa.array(at)).select(result).rename_columns(names)
        yield left, right


def _rows(
    side: Side,
    number: int,
    keys: Sequence[str],
    grid_nm_zyx: Sequence[float],
    classes: Sequence[str],
    schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:
    progress = Progress(f"read {side.source.name}", None, "rows")
    for table in side.source.tables():
        count = len(table)
        row = np.arange(side.rows, side.rows + count)
        position = [table[name].to_numpy() for name in synapses.POSITION]
        _extend(side, np.stack(position))
        side.rows += count
        side.with_neuron += count - table["neuron_id"].null_count
        made = {
            name: table[name] for name in schema.names if name in table.schema.names
        }
        if keys == _GRID:
            known = ~np.isnan(position).any(axis=0)
            for name, values, grid in zip(_GRID, position, grid_nm_zyx, strict=True):
                with np.errstate(over="ignore"):
                    whole = np.rint(np.where(known, values, 0) / grid)
                if (np.abs(whole) >= _MOST).any():
                    raise UserError(
                        f"{side.source.name}: {name.replace('grid_', '')} of "
                        f"{np.abs(values[known]).max():g} nm is too large for a grid "
                        f"of {grid:g} nm; give a larger --tolerance_nm"
                    )
                made[name] = whole.astype(np.int64)
        else:
            known = table["id"].is_valid().to_numpy()
        side.without_key += int((~known).sum())
        made |= {"side": np.full(count, number, np.int8), "row": row}
        absent = np.full(count, np.nan, np.float32)
        for index, name in enumerate(classes):
            here = name in side.source.classes
            made[f"p{index}"] = table[name] if here else absent
        columns = {name: made[name] for name in schema.names}
        filtered = pa.table(columns, schema=schema).filter(pa.array(known))
        yield from filtered.combine_chunks().to_batches()
        progress.add(count)
    progress.close()


def _extend(side: Side, position_nm_zyx: np.ndarray) -> None:
    for bound, smaller in ((side.lowest_nm_zyx, True), (side.highest_nm_zyx, False)):
        ufunc = np.fmin if smaller else np.fmax  # both ignore NaN
        initial = np.inf if smaller else -np.inf
        ufunc(bound, ufunc.reduce(position_nm_zyx, axis=1, initial=initial), out=bound)


def _starts(table: pa.Table, keys: Sequence[str]) -> np.ndarray:
    """Returns bool [n]: the rows whose key differs from the key of the row before."""
    result = np.zeros(len(table), bool)
    result[:1] = True
    for name in keys:
        values = table[name].to_numpy()
        result[1:] |= values[1:] != values[:-1]
    return result


def _deduplicated(
    batches: Iterator[pa.RecordBatch], keys: Sequence[str], sides: tuple[Side, Side]
) -> Iterator[pa.Table]:
    """Yields the sorted rows, with at most one row for each side and key.

    Rows with the same key are always in the same table.
    """
    waiting: pa.Table | None = None
    for batch in itertools.chain(batches, [None]):
        pieces = [] if waiting is None else [waiting]
        pieces += [] if batch is None else [pa.Table.from_batches([batch])]
        if not pieces:
            return
        table = pa.concat_tables(pieces).combine_chunks()
        number = table["side"].to_numpy()
        first = _starts(table, keys)
        first[1:] |= number[1:] != number[:-1]
        _count_duplicates(table, ~first, sides)
        table = table.filter(pa.array(first))
        # The next batch can begin with more rows of the last key.
        end = len(table)
        if batch is not None:
            end = int(np.flatnonzero(_starts(table, keys))[-1])
        waiting = table.slice(end)
        if end:
            yield table.slice(0, end)


def _count_duplicates(
    table: pa.Table, again: np.ndarray, sides: tuple[Side, Side]
) -> None:
    number = table["side"].to_numpy()
    for index, side in enumerate(sides):
        at = np.flatnonzero(again & (number == index))
        side.duplicates += len(at)
        _give_examples(side.duplicate_examples, table, at)


def _count_alone(
    table: pa.Table, second: np.ndarray, in_b: np.ndarray, sides: tuple[Side, Side]
) -> None:
    paired = second.copy()
    paired[:-1] |= second[1:]
    for side, mask in zip(sides, (~in_b, in_b), strict=True):
        at = np.flatnonzero(~paired & mask)
        side.alone += len(at)
        _give_examples(side.alone_examples, table, at)


def _give_examples(
    examples: list[dict[str, Any]], table: pa.Table, at: np.ndarray
) -> None:
    at = at[: _EXAMPLES - len(examples)]
    examples += table.select(["id", *synapses.POSITION]).take(pa.array(at)).to_pylist()
