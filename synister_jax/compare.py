# SPDX-License-Identifier: Apache-2.0
r"""Compares two tables of predictions: of this project, or published ones.

    python -m synister_jax.compare A.feather B.feather --output=DIR
    python -m synister_jax.compare A.feather hemibrain.feather --output=DIR \
        --by=position --voxel_size_nm_zyx=8,8,8

The files may have any size and any of the layouts in docs/exports.md. The command
writes into DIR

    comparison.json        all numbers. `finished` is false until the other files are
                           complete.
    confusion.png          the synapses by their calls in A (rows) and in B (columns)
    disagreements.feather  the rows that differ most; --largest says how many
    neurons.feather        the neurons that A and B call differently, from the most
                           synapses to the fewest

The call of a synapse is the likeliest class of its own file. The call of a neuron is
the majority of its synapses that both files predict. A tie goes to the class that comes
first: in the order of A, and then of the classes that only B has.
"""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from absl import flags

from synister_jax.base import command, files, output_folders, sql
from synister_jax.base.errors import UserError
from synister_jax.exchange import agreement, joining, published
from synister_jax.exchange.joining import Side
from synister_jax.exchange.published import Published
from synister_jax.tables import synapses

FILES = ("confusion.png", "disagreements.feather", "neurons.feather")
# If the tables share a smaller fraction of the smaller one, their ids or positions mean
# something else.
_LEAST_JOINED = 1e-3


def compare(
    a: Published,
    b: Published,
    output: pathlib.Path,
    by: str | None = None,
    tolerance_nm: float | None = None,
    largest: int = 100,
) -> dict[str, Any]:
    """Writes the files above, and returns the content of comparison.json.

    The keys are

    - `tables`, `files`, `finished`: the two tables, and the other files of the folder.
    - `a`, `b`: of each table, `file`, `columns` (our name: the name in the file),
      `classes`, `rows`, `without_key` (rows without an id or position), `duplicates`
      and `only_here` ({rows, examples}), and `called_by_own_classes` ({class that the
      other table lacks: synapses}, over the synapses that both predict).
    - `joined`: `by`, `grid_nm_zyx` (for positions), `rows`, and `predicted` {both,
      only_a, only_b}.
    - `positions`: over the joined rows, {count, mean_difference_nm_zyx (B − A), apart}.
      `apart` is {count, mean_difference_nm_zyx, mean_distance_nm_zyx (|B − A|)} over
      the rows that differ by more than the grid on an axis. Null if a file has no
      positions in nm.
    - `classes`, `common_classes`: the classes of A, then those that only B has.
    - `synapses`: over the synapses that both predict, {count, agreement,
      mean_total_variation, per_class, confusion, confusion_by_row}. `per_class` has for
      each class {called_a, called_b, both, of_a (both / called_a), of_b}. The rows of
      `confusion` are the calls of A and its columns those of B.
    - `probabilities`: {common class: {mean_absolute_difference, correlation}}, with
      Pearson's correlation.
    - `neurons`: the same as `synapses`, by neuron. `ids_of` says whose neuron ids were
      taken ("a", or "b" if A has none), and `ids_differ` counts the synapses whose ids
      differ. Null if neither table has neuron ids.

    A value that is not defined is null. The original calls `confusion` the cross
    confusion, with A as its target and B as its source.

    Args:
      by: "id" or "position". None takes ids if the tables share ids that name the same
        places, and else positions.
      tolerance_nm: the size of the grid to which positions are rounded. None takes the
        voxel size, or 1 nm. Two points on two sides of a border of the grid do not
        meet, however close they are.
      largest: the number of rows in disagreements.feather.

    Raises:
      UserError: the tables share no class or nearly no synapse, no synapse is predicted
        in both, or the files of the folder were made from other tables.
    """
    classes = [*a.classes, *(name for name in b.classes if name not in a.classes)]
    if len(classes) == len(a.classes) + len(b.classes):
        raise UserError(
            f"no class in common: {a.name} has {', '.join(a.classes)}; {b.name} has "
            f"{', '.join(b.classes)}; give tables that share a class"
        )
    plan = {"tables": [a.name, b.name]}
    record = output / "comparison.json"
    working = [*FILES, "neurons.tmp", "query.tmp"]
    output_folders.claim(record, plan, working, plan["tables"])
    sizes = [x.voxel_size_nm_zyx for x in (a, b) if x.in_voxels]
    grid = next((size for size in sizes if size), (1.0, 1.0, 1.0))
    if tolerance_nm is not None:
        grid = (tolerance_nm,) * 3
    refused = []
    for way in _ways(a, b, by):
        sides = Side(a), Side(b)
        found = agreement.Agreement(classes, a.classes, b.classes, grid, largest)
        neurons = _count(sides, found, way, grid, output)
        smaller = min(side.rows for side in sides)
        if not smaller:
            empty = a if not sides[0].rows else b
            raise UserError(f"{empty.name} has no rows")
        if found.joined <= (0 if by else _LEAST_JOINED * smaller):
            refused.append(_too_few(sides, found.joined, way, grid))
        elif way == "id" and not by and found.scattered:
            refused.append(_scattered(found))
        else:
            break
    else:
        raise UserError("; ".join(refused))
    if not found.predicted["both"]:
        raise UserError(
            f"none of the {found.joined:,} synapses that are in both tables has a "
            f"prediction in both ({found.predicted['only_a']:,} only in {a.name}, "
            f"{found.predicted['only_b']:,} only in {b.name})"
        )
    votes = neurons.numbers(sides, found.neuron_ids_differ)
    result = plan | _describe(sides, found, way, grid) | {"neurons": votes}
    _write(output, result, found, neurons)
    return output_folders.finish(record, result, FILES)


def _ways(a: Published, b: Published, by: str | None) -> list[str]:
    """Returns the keys by which the tables can be joined, the better one first."""
    lacking = {
        "id": [f"{x.name} has no ids" for x in (a, b) if "id" not in x.columns],
        "position": [_no_positions(x) for x in (a, b) if not x.has_positions],
    }
    asked = list(lacking) if by is None else [by]
    possible = [way for way in asked if not lacking[way]]
    if not possible:
        why = dict.fromkeys(line for way in asked for line in lacking[way])
        raise UserError(f"cannot find the same synapses in both: {'; '.join(why)}")
    return possible


def _no_positions(table: Published) -> str:
    if "z_nm" not in table.columns:
        return f"{table.name} has no positions"
    return (
        f"positions of {table.name} (columns z, y, x) are voxels: give "
        "--voxel_size_nm_zyx (1,1,1 if they are nm)"
    )


def _too_few(sides: tuple[Side, Side], joined: int, by: str, grid: Any) -> str:
    """Returns a message: the ids or positions of both tables, and a likely cause."""
    what = "ids" if by == "id" else f"positions (rounded to {_numbers(grid)} nm zyx)"
    parts = []
    for side in sides:
        shown = [
            str(x["id"]) if by == "id" else f"({_numbers(_position(x))})"
            for x in side.alone_examples
        ]
        distinct = side.rows - side.without_key - side.duplicates
        as_ = f", as {', '.join(shown)}" if shown else ""
        parts.append(f"{side.source.name} has {distinct:,}{as_}")
    line = f"by {by}: {joined:,} {what} in common; {'; '.join(parts)}"
    if joined:
        line += f"; --by={by} compares these {joined:,} all the same"
    return line + _hint(sides)


def _scattered(found: agreement.Agreement) -> str:
    return (
        f"by id: {found.joined:,} ids in common, but of their synapses "
        f"{_elsewhere(found.numbers()['positions']['apart'])}: the ids seem to name "
        f"other synapses; --by=id compares these {found.joined:,} all the same"
    )


def _elsewhere(apart: dict[str, Any]) -> str:
    shift, distance = apart["mean_difference_nm_zyx"], apart["mean_distance_nm_zyx"]
    line = f"{apart['count']:,} lie elsewhere in B"
    if agreement.in_one_direction(shift, distance):
        return f"{line} (on average {_numbers(shift)} nm zyx away)"
    return f"{line} (typically {_numbers(distance)} nm zyx away, in no one direction)"


def _hint(sides: tuple[Side, Side]) -> str:
    a, b = sides
    for side in sides:
        if side.source.in_voxels and not side.source.has_positions:
            return f"; {_no_positions(side.source)}"
    ranges = []
    for side in sides:
        if not np.isfinite(side.highest_nm_zyx).all():
            return "; do the ids of both files come from the same set of synapses?"
        low, high = side.lowest_nm_zyx, side.highest_nm_zyx
        ends = zip("zyx", low, high, strict=True)
        axes = [f"{axis} {first:g} to {last:g}" for axis, first, last in ends]
        ranges.append(f"{side.source.name} lies in {', '.join(axes)} nm")
    line = f"; {'; '.join(ranges)}"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = a.highest_nm_zyx / b.highest_nm_zyx
    for one, times in ((b, ratio), (a, 1 / ratio)):
        if (times > 2.5).all():  # a voxel has at least 4 nm
            return (
                f"{line}: the positions of {one.source.name} look like voxels of about "
                f"{_numbers(times)} nm zyx; convert them to nm, or check "
                "--voxel_size_nm_zyx"
            )
    return (
        f"{line}: do both use the same coordinates? Convert one of them (the tables of "
        "CATMAID lie 40 nm in z from their volume), or give --tolerance_nm"
    )


def _position(example: dict[str, Any]) -> list[float]:
    return [example[name] for name in synapses.POSITION]


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.8g}" for value in values)


def _count(
    sides: tuple[Side, Side],
    found: agreement.Agreement,
    by: str,
    grid_nm_zyx: Sequence[float],
    folder: pathlib.Path,
) -> agreement.Neurons:
    """Reads both tables once. Adds the synapses to `found`, and returns the neurons."""
    classes = found.classes

    def called() -> Iterator[pa.RecordBatch]:
        for left, right in joining.pairs(*sides, by, grid_nm_zyx, classes, folder):
            neuron = (left if sides[0].with_neuron else right)["neuron_id"]
            both, a, b = found.add(left, right, neuron)
            batch = {"neuron": neuron.filter(pa.array(both)), "a": a, "b": b}
            table = pa.table(batch, schema=agreement.CALLED)
            yield from table.combine_chunks().to_batches()

    neurons = agreement.Neurons(classes)
    with files.scratch(folder / "neurons") as work:
        query = agreement.neurons_query(len(classes))
        # An error must close the query at once.
        with contextlib.closing(
            sql.run(query, agreement.CALLED, called(), work)
        ) as batches:
            for batch in batches:
                neurons.add(batch)
    return neurons


def _describe(
    sides: tuple[Side, Side],
    found: agreement.Agreement,
    by: str,
    grid_nm_zyx: Sequence[float],
) -> dict[str, Any]:
    measured = found.numbers()
    result: dict[str, Any] = {}
    others = reversed(sides)
    for name, axis, side, other in zip("ab", (1, 0), sides, others, strict=True):
        calls = found.confusion.sum(axis=axis)
        result[name] = {
            "file": side.source.name,
            "columns": dict(side.source.columns),
            "classes": list(side.source.classes),
            "rows": side.rows,
            "without_key": side.without_key,
            "duplicates": {
                "rows": side.duplicates,
                "examples": side.duplicate_examples,
            },
            "only_here": {"rows": side.alone, "examples": side.alone_examples},
            "called_by_own_classes": {
                c: int(calls[found.classes.index(c)])
                for c in side.source.classes
                if c not in other.source.classes
            },
        }
    return result | {
        "joined": {
            "by": by,
            "grid_nm_zyx": list(grid_nm_zyx) if by == "position" else None,
            "rows": found.joined,
            "predicted": dict(found.predicted),
        },
        "positions": measured["positions"],
        "classes": found.classes,
        "common_classes": found.common,
        "synapses": measured["synapses"],
        "probabilities": measured["probabilities"],
    }


def _write(
    output: pathlib.Path,
    result: dict[str, Any],
    found: agreement.Agreement,
    neurons: agreement.Neurons,
) -> None:
    from synister_jax.base import figures  # takes half a second to import

    names = [f"{x.upper()}: {pathlib.Path(result[x]['file']).name}" for x in "ab"]
    numbers = result["synapses"]
    title = f"{numbers['count']:,} synapses, {numbers['agreement']:.3f} called alike"
    picture = figures.confusion(
        found.confusion, found.classes, title, (names[0], names[1])
    )
    files.write_bytes(output / "confusion.png", figures.png(picture))
    files.write_feather(output / "disagreements.feather", found.largest())
    files.write_feather(output / "neurons.feather", neurons.different())


def summary(result: dict[str, Any]) -> str:
    """Returns some lines for people about what `compare` found."""
    lines = []
    for name in "ab":
        side = result[name]
        line = f"{name.upper()}: {side['file']}, {side['rows']:,} rows, "
        line += f"{side['only_here']['rows']:,} only here"
        if side["duplicates"]["rows"]:
            line += f", {side['duplicates']['rows']:,} duplicates left out"
        if side["without_key"]:
            line += f", {side['without_key']:,} without {result['joined']['by']}"
        for own, count in side["called_by_own_classes"].items():
            line += f", {count:,} called {own} (a class of {name.upper()} only)"
        lines.append(line)
    joined, positions = result["joined"], result["positions"]
    line = f"joined by {joined['by']}"
    if joined["grid_nm_zyx"]:
        line += f" (rounded to {_numbers(joined['grid_nm_zyx'])} nm zyx)"
    line += f": {joined['rows']:,}, {joined['predicted']['both']:,} predicted in both"
    lines.append(line)
    if positions and positions["apart"]["count"]:
        lines.append(
            f"of these, {_elsewhere(positions['apart'])}: do the files use different "
            "coordinates, or do the ids name other synapses?"
        )
    for what in ("synapses", "neurons"):
        numbers = result[what]
        if numbers and numbers["count"]:
            share = f"{numbers['agreement']:.3f} of {numbers['count']:,} called alike"
            each = [
                f"{name} {of['of_a']:.3f}"
                for name, of in numbers["per_class"].items()
                if of["of_a"] is not None
            ]
            lines.append(f"{what}: {share}; of A's {', '.join(each)}")
    return "\n".join(lines)


def main() -> None:
    output = flags.DEFINE_string(
        "output", None, "Write the comparison into this folder.", required=True
    )
    by = flags.DEFINE_enum(
        "by",
        None,
        list(joining.KEYS),
        "Find the same synapse in both tables by its id or by its position. By default "
        "by id, if the tables share ids.",
    )
    tolerance = flags.DEFINE_float(
        "tolerance_nm",
        None,
        "Round positions to a grid of this size in nm before they are compared. By "
        "default the voxel size.",
        lower_bound=0.001,
    )
    voxel_size = flags.DEFINE_list(
        "voxel_size_nm_zyx",
        None,
        "Give the voxel size, Z,Y,X in nm, if positions of a file are voxels (columns "
        "z, y, x).",
    )
    largest = flags.DEFINE_integer(
        "largest",
        100,
        "Write this many of the synapses that differ most into disagreements.feather.",
        lower_bound=0,
    )

    def run(first: str, second: str) -> None:
        size = None
        if voxel_size.value is not None:
            size = command.three_numbers("voxel_size_nm_zyx", voxel_size.value, True)
        if tolerance.value is not None and not math.isfinite(tolerance.value):
            raise UserError(f"--tolerance_nm={tolerance.value}: give a finite number")
        a, b = published.open(first, size), published.open(second, size)
        if size and not (a.in_voxels or b.in_voxels):
            raise UserError(
                "--voxel_size_nm_zyx: neither file has positions in voxels (columns "
                "z, y, x); leave the flag out"
            )
        folder = pathlib.Path(output.value)
        result = compare(a, b, folder, by.value, tolerance.value, largest.value)
        print(summary(result))
        print(f"{folder}/comparison.json")

    command.run(run, positional=("A", "B"))


if __name__ == "__main__":
    main()
