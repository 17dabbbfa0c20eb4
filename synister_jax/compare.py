# SPDX-License-Identifier: Apache-2.0
"""Compares a table of predictions with another: ours, or a published one.

    python -m synister_jax.compare A.feather B.feather --output=DIR
    python -m synister_jax.compare A.feather hemibrain.feather --output=DIR \
        --by=position --voxel_size_nm_zyx=8,8,8

Either file is any that published.py knows, of any size. Writes to DIR
    comparison.json        all numbers; `compare` says what they are. `finished` is
                           false until the other files are there
    confusion.png          synapses by their calls in A (rows) and in B (columns)
    disagreements.feather  the --largest rows that differ most
    neurons.feather        neurons that are called differently, most synapses first

A synapse's call is its likeliest class among those of its own file, ties to the first
class (A's order, then the classes that only B has). A neuron's call is the majority of
its synapses that both predict, ties alike.
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
# Of the smaller table: with less in common, ids or positions mean something else.
_LEAST_JOINED = 1e-3


def compare(
    a: Published,
    b: Published,
    output: pathlib.Path,
    by: str | None = None,
    tolerance_nm: float | None = None,
    largest: int = 100,
) -> dict[str, Any]:
    """Writes the files above; returns the content of comparison.json:

    tables: both; files: the other ones; finished
    a, b: file, columns (ours: the file's), classes, rows, without_key, duplicates and
      only_here ({rows, examples}), called_by_own_classes {class that the other lacks:
      synapses, of those that both predict}
    joined: by, grid_nm_zyx (of positions), rows, predicted {both, only_a, only_b}
    positions: of joined rows {count, mean_difference_nm_zyx (B − A), apart: of those
      that differ by more than the grid on an axis {count, mean_difference_nm_zyx,
      mean_distance_nm_zyx (|B − A|)}}; null where a file has none in nm
    classes: of A, then those that only B has; common_classes
    synapses: {count, agreement, mean_total_variation, per_class {class: {called_a,
      called_b, both, of_a (both / called_a), of_b}}, confusion (counts, rows A, columns
      B), confusion_by_row}, over the synapses that both predict
    probabilities: {common class: {mean_absolute_difference, correlation (Pearson)}}
    neurons: the same as synapses by neuron, with ids_of ("a", or "b" where A has none)
      and, over synapses, ids_differ; null where neither has ids

    None stands for what is undefined. `confusion` is what the original calls cross
    confusion, with A as its target and B as its source.

    Args:
      by: "id" or "position"; None: ids where they are in common and of one place in
        both, else positions.
      tolerance_nm: size of the grid that positions are rounded to; None: the voxel
        size, or 1 nm. Points on two sides of a border do not meet, however close.
      largest: rows of disagreements.feather.

    Raises:
      UserError: no class or (nearly) no synapse in common, nothing predicted in both;
        a folder whose files are not from these tables.
    """
    classes = [*a.classes, *(name for name in b.classes if name not in a.classes)]
    if len(classes) == len(a.classes) + len(b.classes):
        raise UserError(
            f"no class in common: {a.name} has {', '.join(a.classes)}; {b.name} has "
            f"{', '.join(b.classes)}"
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
            f"none of the {found.joined:,} synapses that both have is predicted in "
            f"both ({found.predicted['only_a']:,} only in {a.name}, "
            f"{found.predicted['only_b']:,} only in {b.name})"
        )
    votes = neurons.numbers(sides, found.neuron_ids_differ)
    result = plan | _describe(sides, found, way, grid) | {"neurons": votes}
    _write(output, result, found, neurons)
    return output_folders.finish(record, result, FILES)


def _ways(a: Published, b: Published, by: str | None) -> list[str]:
    """What to join by, the better first."""
    lacking = {
        "id": [f"{x.name} has no ids" for x in (a, b) if "id" not in x.columns],
        "position": [_no_positions(x) for x in (a, b) if not x.has_positions],
    }
    asked = list(lacking) if by is None else [by]
    possible = [way for way in asked if not lacking[way]]
    if not possible:
        why = dict.fromkeys(line for way in asked for line in lacking[way])
        raise UserError(f"cannot join: {'; '.join(why)}")
    return possible


def _no_positions(table: Published) -> str:
    if "z_nm" not in table.columns:
        return f"{table.name} has no positions"
    return (
        f"positions of {table.name} (columns z, y, x) are voxels: give "
        "--voxel_size_nm_zyx (1,1,1 if they are nm)"
    )


def _too_few(sides: tuple[Side, Side], joined: int, by: str, grid: Any) -> str:
    """What there is on either side, and what may be the matter."""
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
        f"{_elsewhere(found.numbers()['positions']['apart'])}: the ids seem to be of "
        f"another set; --by=id compares these {found.joined:,} all the same"
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
            return "; there are no positions to tell why: are the ids of one set?"
        low, high = side.lowest_nm_zyx, side.highest_nm_zyx
        ends = zip("zyx", low, high, strict=True)
        axes = [f"{axis} {first:g} to {last:g}" for axis, first, last in ends]
        ranges.append(f"{side.source.name} lies in {', '.join(axes)} nm")
    line = f"; {'; '.join(ranges)}"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = a.highest_nm_zyx / b.highest_nm_zyx
    for one, times in ((b, ratio), (a, 1 / ratio)):
        if (times > 2.5).all():  # voxels are of 4 nm at least
            return (
                f"{line}: {one.source.name} looks as if in voxels (of about "
                f"{_numbers(times)} nm zyx); convert it to nm, or check "
                "--voxel_size_nm_zyx"
            )
    return (
        f"{line}: are both in one coordinate space? Bring one into the other's "
        "(tables of CATMAID lie 40 nm in z from their volume), or give --tolerance_nm"
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
    """Reads both tables once: synapses go to `found`, neurons are returned."""
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
        # Closed at once where an error ends it.
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
    """Some lines for people, of what `compare` returns."""
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
            f"of these, {_elsewhere(positions['apart'])}: is it another coordinate "
            "space, or are the ids of another set?"
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
    output = flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    by = flags.DEFINE_enum(
        "by", None, list(joining.KEYS), "What rows have in common; id if it can be."
    )
    tolerance = flags.DEFINE_float(
        "tolerance_nm", None, "Grid that positions are rounded to.", lower_bound=0.001
    )
    voxel_size = flags.DEFINE_list(
        "voxel_size_nm_zyx", None, "Of a file whose positions are voxels."
    )
    largest = flags.DEFINE_integer(
        "largest", 100, "Rows of disagreements.feather.", lower_bound=0
    )

    def run(first: str, second: str) -> None:
        size = None
        if voxel_size.value is not None:
            size = command.three_numbers("voxel_size_nm_zyx", voxel_size.value, True)
        if tolerance.value is not None and not math.isfinite(tolerance.value):
            raise UserError(f"--tolerance_nm={tolerance.value}: not possible")
        a, b = published.open(first, size), published.open(second, size)
        if size and not (a.in_voxels or b.in_voxels):
            raise UserError(
                "--voxel_size_nm_zyx: neither file has positions in voxels (columns "
                "z, y, x); leave it out"
            )
        folder = pathlib.Path(output.value)
        result = compare(a, b, folder, by.value, tolerance.value, largest.value)
        print(summary(result))
        print(f"{folder}/comparison.json")

    command.run(run, positional=("A", "B"))


if __name__ == "__main__":
    main()
