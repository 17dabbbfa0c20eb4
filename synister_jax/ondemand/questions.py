# SPDX-License-Identifier: Apache-2.0
"""What people ask for: neurons or positions in CSV or pasted text, checked row by row.

UTF-8 with cells separated by commas, semicolons or tabs. The first line names the
columns: one of `NEURON`; or x, y and z, with or without one of `ID` and one of
`NEURON`; other columns are left out. Without such a line there are ids, any number a
line, or on every line x, y, z, or id, x, y, z, or id, skid, x, y, z.

What is read may come from anyone: memory is bounded, time grows with the length, and
whatever is wrong is told by line.
"""

import array
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.ondemand import question_cells, question_lines
from synister_jax.ondemand.question_cells import (
    coordinate,
    integer,
    neuron,
    neutralised,
    shown,
)
from synister_jax.ondemand.question_lines import LineProblem, Lines, Stop, Told

__all__ = ["Asked", "Checked", "LineProblem", "check", "load", "neutralised"]

NEURON = (
    "skid",
    "neuron_id",
    "skeleton_id",
    "bodyid",
    "body_id",
    "body",
    "root_id",
    "pt_root_id",
    "flywire_id",
)
ID = ("id", "position_id", "connector_id", "synapse_id")
NEURONS = pa.schema([("neuron_id", pa.int64())])
POSITIONS = pa.schema(
    [
        ("position_id", pa.int64()),
        ("neuron_id", pa.int64()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("z", pa.float64()),
    ]
)

_EXCEL = re.compile(r'"?sep=.?"?', re.IGNORECASE)  # a line that Excel understands
_PLACE = re.compile(r"(^|[^a-z])[xyz]([^a-z]|$)|position|coord")
_AXES = ("x", "y", "z")
_ROLES = {name: "neuron" for name in NEURON}
_ROLES |= {name: "id" for name in ID} | {name: name for name in _AXES}
# Columns of lines without a header, by their number.
_UNNAMED = {3: _AXES, 4: ("id", *_AXES), 5: ("id", "skid", *_AXES)}
_LINES_A_ROW = 10  # at most, over all: else blank lines could go on for ever


Kind = Literal["neurons", "positions"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for: `table` has the columns `NEURONS` or `POSITIONS`."""

    kind: Kind  # neurons: each once, in the order of first mention
    table: pa.Table


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found; there is `asked` exactly when there is no error."""

    kind: Kind | None  # None: it could not be told
    asked: Asked | None
    rows: int  # read: positions, or mentions of neurons
    errors: list[LineProblem]  # the first question_lines.MOST_TOLD
    error_count: int
    warnings: list[LineProblem]
    warning_count: int


def check(
    stream: BinaryIO, kind: Kind | None = None, most_rows: int = 1_000_000
) -> Checked:
    """Reads a request to its end, or to an error after which the rest says nothing.

    No bytes make it raise; what `stream.read` raises passes through.

    Args:
      kind: something else in the stream is an error.
      most_rows: beyond which nothing is read.
    """
    told = Told()
    lines = Lines(stream, told, _LINES_A_ROW * max(most_rows, 1000))
    layout: _Layout | None = None
    rows: _Neurons | _Positions | None = None
    try:
        layout = _layout(lines, told, kind)
        reader = _Neurons if layout.kind == "neurons" else _Positions
        rows = reader(layout, told, most_rows)
        for line, cells in layout.rows:
            rows.add(line, cells)
        if not rows.count and not told.error_count:
            raise Stop(0, "there is no row after the header; write what you ask for")
    except Stop as stop:
        told.error(stop.line, "", str(stop))
    return Checked(
        kind=None if layout is None else layout.kind,
        asked=None if rows is None or told.error_count else rows.asked(),
        rows=0 if rows is None else rows.count,
        errors=told.errors,
        error_count=told.error_count,
        warnings=told.warnings,
        warning_count=told.warning_count,
    )


def load(path: str, kind: Kind | None) -> tuple[Asked, list[LineProblem]]:
    """What the file asks for, with warnings; as `check`.

    Raises:
      UserError: the file is not there; its first errors by line.
    """
    try:
        with open(path, "rb") as stream:
            checked = check(stream, kind)
    except (OSError, ValueError) as error:  # ValueError: of a name with a NUL
        raise UserError(f"cannot read {path}: {error}") from None
    if checked.asked is None:
        first = "; ".join(map(str, checked.errors[:5]))
        more = checked.error_count - 5
        and_more = f"; and {more:,} more" if more > 0 else ""
        raise UserError(f"{path}: {first}{and_more}")
    return checked.asked, checked.warnings


@dataclasses.dataclass(frozen=True)
class _Layout:
    kind: Kind
    names: list[str]  # of the columns, as written; empty for ids without a header
    places: dict[str, int]  # of the columns in use, by role
    rows: Iterator[tuple[int, list[str]]]  # to come: first line and cells of each


def _layout(lines: Lines, told: Told, kind: Kind | None) -> _Layout:
    """What the columns are, from the first row. Raises `Stop` where it does not say."""
    first = lines.peek()
    if first is not None and _EXCEL.fullmatch(first.strip()):
        next(lines)  # which separator it is, the next line shows
        lines.begin()
        first = lines.peek()
    if first is None:
        raise Stop(0, "there is nothing in it; write ids of neurons, or positions")
    known = {
        each: sum(_role(name) is not None for name in question_lines.cells(first, each))
        for each in (",", ";", "\t")
    }
    delimiter = max(known, key=known.__getitem__)
    if not known[delimiter]:  # blanks separate only then: "Body ID" is one name
        names = question_lines.cells(first, "")
        delimiter, known = "", {"": sum(_role(name) is not None for name in names)}
    if known[delimiter]:
        rows = question_lines.rows(lines, delimiter, told)
        line, header = next(rows, (lines.first, []))
        if told.error_count:
            raise Stop(line, "this first line cannot be read; mend it, then the rest")
        return _named(line, [name.strip() for name in header], rows, told, kind)
    delimiter = next((each for each in "\t;," if each in first), "")
    return _unnamed(lines, first, delimiter, told, kind)


def _role(name: str) -> str | None:
    return _ROLES.get("_".join(name.lower().split()))


def _named(
    line: int,
    names: list[str],
    rows: Iterator[tuple[int, list[str]]],
    told: Told,
    kind: Kind | None,
) -> _Layout:
    """The layout of a first line that names columns."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if (role := _role(name)) is not None:
            found.setdefault(role, []).append(place)
    is_there: Kind = "neurons" if found.keys().isdisjoint(_AXES) else "positions"
    if is_there == "neurons" and "neuron" not in found:
        raise Stop(
            line,
            f"names neither neurons ({', '.join(NEURON)}) nor x, y and z; name the "
            "columns so",
        )
    if kind == "neurons" and is_there == "positions":
        raise Stop(
            line,
            "there are columns of positions, and neurons were to be there; ask for "
            "positions, or leave out the columns x, y and z",
        )
    if kind == "positions" and is_there == "neurons":
        raise Stop(
            line,
            "there are neurons, and positions were to be there; ask for neurons, or "
            "add the columns x, y and z",
        )
    others = [shown(name) for name in names if _PLACE.search(name.lower())]
    if is_there == "neurons" and others:
        told.warning(
            line,
            "",
            f"these are taken for neurons, and {', '.join(others[:3])} is left out; "
            "columns of positions are called x, y and z",
        )
    wanted = ("neuron",) if is_there == "neurons" else ("id", "neuron", *_AXES)
    for role in wanted:
        if role in _AXES and role not in found:
            raise Stop(line, f"there is no column {role}; positions have x, y and z")
        if len(found.get(role, [])) > 1:
            given = " and ".join(shown(names[place]) for place in found[role][:3])
            raise Stop(line, f"columns {given} would say the same; keep one of them")
    places = {role: found[role][0] for role in wanted if role in found}
    return _Layout(is_there, names, places, rows)


def _unnamed(
    lines: Lines, first: str, delimiter: str, told: Told, kind: Kind | None
) -> _Layout:
    """The layout of rows without a header, of which `first` is the first line."""
    line = lines.first
    given = [cell.strip() for cell in question_lines.cells(first, delimiter)]
    cells = list(given)
    while cells and not cells[-1]:
        cells.pop()
    if not any(map(question_cells.like_data, cells)):
        raise Stop(
            line,
            f"names no column that is known: call neurons {', '.join(NEURON)}; call "
            "coordinates x, y and z",
        )
    if kind is None:
        kind = "positions" if len(cells) in _UNNAMED else "neurons"
        if kind == "positions":
            why = f"without a header the columns are {', '.join(_UNNAMED[len(cells)])};"
            told.warning(0, "", f"{why} if these are neurons, write one id a line")
    if kind == "neurons":
        return _Layout(kind, [], {}, question_lines.rows(lines, ",", told))
    if len(cells) not in _UNNAMED:
        expected = ", or ".join(map(", ".join, _UNNAMED.values()))
        raise Stop(line, f"has {_count(cells)}; a position is {expected}")
    if len(cells) < len(given):
        raise Stop(
            line,
            "ends in an empty cell, so it does not say which one that is; write a "
            "line before it that names the columns, as id,x,y,z",
        )
    names = list(_UNNAMED[len(cells)])
    places = {_ROLES[name]: place for place, name in enumerate(names)}
    return _Layout(kind, names, places, question_lines.rows(lines, delimiter, told))


class _Rows:
    """What rows of both kinds share: their number, and how many cells they have."""

    def __init__(self, layout: _Layout, told: Told, most: int) -> None:
        self._names, self._places = layout.names, layout.places
        self._told, self._most = told, most
        self.count = 0

    def _begin(self, line: int) -> None:
        if self.count >= self._most:
            why = f"there are more than {self._most:,} rows; ask for some at a time"
            raise Stop(line, why)
        self.count += 1

    def _fits(self, line: int, cells: list[str]) -> bool:
        """A cell for each name; empty ones at the end do not count."""
        beyond = cells[len(self._names) :]
        if len(cells) >= len(self._names) and not any(map(str.strip, beyond)):
            return True
        self._told.error(
            line,
            "",
            f"has {_count(cells)} where the first line has {len(self._names)}; add or "
            "remove some, or quote the one that holds the separator",
        )
        return False

    def _left_out(self, line: int, cells: list[str]) -> bool:
        """Nothing in it, as spreadsheets leave rows below a table."""
        if any(map(str.strip, cells)):
            return False
        self._told.warning(line, "", "is empty; left out")
        return True


class _Neurons(_Rows):
    """Rows that name a neuron each; without a header any number of them."""

    def __init__(self, layout: _Layout, told: Told, most: int) -> None:
        super().__init__(layout, told, most)
        self._ids = array.array("q")

    def add(self, line: int, cells: list[str]) -> None:
        if not self._names:
            for part in re.split(r"[\s;]+", "\n".join(cells)):
                if part:
                    self._begin(line)
                    self._add(line, "", part)
        elif not self._left_out(line, cells):
            self._begin(line)
            if self._fits(line, cells):
                place = self._places["neuron"]
                self._add(line, self._names[place], cells[place])

    def _add(self, line: int, column: str, text: str) -> None:
        try:
            self._ids.append(integer(text))
        except ValueError as error:
            self._told.error(line, column, str(error))

    def asked(self) -> Asked:
        ids = np.frombuffer(self._ids, np.int64)
        _, first = np.unique(ids, return_index=True)
        if (again := len(ids) - len(first)) > 0:
            what = "id is" if again == 1 else "ids are"
            why = f"{again:,} {what} there already; each neuron is answered once"
            self._told.warning(0, "", why)
        return Asked("neurons", pa.table([ids[np.sort(first)]], schema=NEURONS))


class _Positions(_Rows):
    """Rows of x, y, z, with or without an id and a neuron."""

    def __init__(self, layout: _Layout, told: Told, most: int) -> None:
        super().__init__(layout, told, most)
        self._axes = [self._places[axis] for axis in _AXES]
        self._id, self._neuron = map(self._places.get, ("id", "neuron"))
        self._ids, self._neurons = array.array("q"), array.array("q")
        self._xyz = array.array("d")

    def add(self, line: int, cells: list[str]) -> None:
        # Without ids a position is known by its place, so none is left out.
        has_id = self._id is not None
        if has_id and not cells[0].strip() and self._left_out(line, cells):
            return
        self._begin(line)
        if len(cells) != len(self._names) and not self._fits(line, cells):
            return
        try:
            id_ = self.count if self._id is None else integer(cells[self._id])
            of = -1 if self._neuron is None else neuron(cells[self._neuron])
            xyz = [coordinate(cells[place]) for place in self._axes]
        except ValueError:
            self._tell(line, cells)
            return
        if math.isnan(sum(xyz)):
            self._warn(line, xyz)
        self._ids.append(id_)
        self._neurons.append(of)
        self._xyz.extend(xyz)

    def _warn(self, line: int, xyz: list[float]) -> None:
        pairs = zip(self._axes, xyz, strict=True)
        missing = [self._names[place] for place, value in pairs if math.isnan(value)]
        what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} empty"
        self._told.warning(line, "", f"{what}; answered with status bad_position")

    def _tell(self, line: int, cells: list[str]) -> None:
        """Every cell of the row that is wrong."""
        for role, place in self._places.items():
            parse = {"id": integer, "neuron": neuron}.get(role, coordinate)
            try:
                parse(cells[place])
            except ValueError as error:
                self._told.error(line, self._names[place], str(error))

    def asked(self) -> Asked:
        neurons = np.frombuffer(self._neurons, np.int64)
        xyz = np.frombuffer(self._xyz, np.float64).reshape(-1, 3)
        columns = [
            pa.array(np.frombuffer(self._ids, np.int64)),
            pa.array(neurons, mask=neurons < 0),
            *(pa.array(np.ascontiguousarray(column)) for column in xyz.T),
        ]
        return Asked("positions", pa.table(columns, schema=POSITIONS))


def _count(cells: list[str]) -> str:
    return f"{len(cells)} cell{'s' if len(cells) > 1 else ''}"
