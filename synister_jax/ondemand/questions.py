# SPDX-License-Identifier: Apache-2.0
"""Reads a request for neurons or positions from CSV or pasted text, and checks it.

The text is UTF-8, and commas, semicolons or tabs separate the cells. The first line can
name the columns. For neurons, this is one of `NEURON`. For positions, these are x, y
and z, and optionally one of `ID` and one of `NEURON`. Other columns are ignored.

Without such a line, the text has ids of neurons, any number on a line. Or every line is
a position: x, y, z, or id, x, y, z, or id, skid, x, y, z.

The text may come from anyone. Memory is therefore bounded, the time grows with the
length of the text, and every problem is reported with its line.
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

_EXCEL = re.compile(
    r'"?sep=.?"?', re.IGNORECASE
)  # a line that tells Excel the separator
_PLACE = re.compile(r"(^|[^a-z])[xyz]([^a-z]|$)|position|coord")
_AXES = ("x", "y", "z")
_ROLES = {name: "neuron" for name in NEURON}
_ROLES |= {name: "id" for name in ID} | {name: name for name in _AXES}
# Columns of lines without a header, by their number.
_UNNAMED = {3: _AXES, 4: ("id", *_AXES), 5: ("id", "skid", *_AXES)}
# A text may have at most this many lines for each allowed row. Without this limit, the
# blank lines of a stream might never end.
_LINES_A_ROW = 10


Kind = Literal["neurons", "positions"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The neurons or positions of a request.

    The columns of `table` are `NEURONS` or `POSITIONS`.
    """

    kind: Kind  # each neuron occurs once, in the order of its first mention
    table: pa.Table


@dataclasses.dataclass(frozen=True)
class Checked:
    """The result of a check. `asked` is None if, and only if, there is an error."""

    kind: Kind | None  # None: the kind could not be recognised
    asked: Asked | None
    rows: int  # the number of positions, or of mentions of neurons, that were read
    errors: list[LineProblem]  # at most the first question_lines.MOST_TOLD
    error_count: int
    warnings: list[LineProblem]
    warning_count: int


def check(
    stream: BinaryIO, kind: Kind | None = None, most_rows: int = 1_000_000
) -> Checked:
    """Reads and checks a request.

    Reading stops at the end, or at an error that makes the rest meaningless. The
    function raises no error for any content of the stream. Errors of `stream.read` are
    not caught.

    Args:
      stream: the text of the request.
      kind: the kind that the request must have; None accepts both kinds.
      most_rows: the largest number of rows. More rows are an error.
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
            raise Stop(
                0, "there is no row after the header; add the rows that you ask for"
            )
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
    """Reads and checks a file with a request, and returns the request and warnings.

    Args:
      path: the file.
      kind: the kind that the request must have; None accepts both kinds.

    Raises:
      UserError: the file cannot be read or has errors. The message has the first five
        errors with their lines.
    """
    try:
        with open(path, "rb") as stream:
            checked = check(stream, kind)
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL byte
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
    names: list[str]  # the column names as written; empty for ids without a header
    places: dict[str, int]  # the index of the column of each role that is used
    rows: Iterator[tuple[int, list[str]]]  # the rows to read: first line and cells


def _layout(lines: Lines, told: Told, kind: Kind | None) -> _Layout:
    """Finds the columns from the first row; raises `Stop` if the row is unclear."""
    first = lines.peek()
    if first is not None and _EXCEL.fullmatch(first.strip()):
        next(lines)  # the next line shows which separator is used
        lines.begin()
        first = lines.peek()
    if first is None:
        raise Stop(0, "the text has nothing in it; write ids of neurons, or positions")
    known = {
        each: sum(_role(name) is not None for name in question_lines.cells(first, each))
        for each in (",", ";", "\t")
    }
    delimiter = max(known, key=known.__getitem__)
    if not known[delimiter]:  # "Body ID" is one name: blanks are tried last
        names = question_lines.cells(first, "")
        delimiter, known = "", {"": sum(_role(name) is not None for name in names)}
    if known[delimiter]:
        rows = question_lines.rows(lines, delimiter, told)
        line, header = next(rows, (lines.first, []))
        if told.error_count:
            raise Stop(
                line,
                "the first line cannot be read; correct it before the others",
            )
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
    """Returns the layout of a text whose first line names the columns."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if (role := _role(name)) is not None:
            found.setdefault(role, []).append(place)
    is_there: Kind = "neurons" if found.keys().isdisjoint(_AXES) else "positions"
    if is_there == "neurons" and "neuron" not in found:
        raise Stop(
            line,
            f"the line names neither neurons ({', '.join(NEURON)}) nor x, y and z; use "
            "these names for the columns",
        )
    if kind == "neurons" and is_there == "positions":
        raise Stop(
            line,
            "the columns are those of positions, but neurons are expected; ask for "
            "positions, or leave out the columns x, y and z",
        )
    if kind == "positions" and is_there == "neurons":
        raise Stop(
            line,
            "the columns are those of neurons, but positions are expected; ask for "
            "neurons, or add the columns x, y and z",
        )
    others = [shown(name) for name in names if _PLACE.search(name.lower())]
    if is_there == "neurons" and others:
        told.warning(
            line,
            "",
            f"the rows are read as neurons, and {', '.join(others[:3])} is ignored; "
            "for positions, name the columns x, y and z",
        )
    wanted = ("neuron",) if is_there == "neurons" else ("id", "neuron", *_AXES)
    for role in wanted:
        if role in _AXES and role not in found:
            raise Stop(line, f"there is no column {role}; positions need x, y and z")
        if len(found.get(role, [])) > 1:
            given = " and ".join(shown(names[place]) for place in found[role][:3])
            raise Stop(
                line, f"the columns {given} have the same meaning; keep one of them"
            )
    places = {role: found[role][0] for role in wanted if role in found}
    return _Layout(is_there, names, places, rows)


def _unnamed(
    lines: Lines, first: str, delimiter: str, told: Told, kind: Kind | None
) -> _Layout:
    """Returns the layout of rows without a header; `first` is the first line."""
    line = lines.first
    given = [cell.strip() for cell in question_lines.cells(first, delimiter)]
    cells = list(given)
    while cells and not cells[-1]:
        cells.pop()
    if not any(map(question_cells.like_data, cells)):
        raise Stop(
            line,
            "the line names no known column; name a column of neurons "
            f"{', '.join(NEURON)}; name columns of coordinates x, y and z",
        )
    if kind is None:
        kind = "positions" if len(cells) in _UNNAMED else "neurons"
        if kind == "positions":
            why = f"without a header the columns are {', '.join(_UNNAMED[len(cells)])};"
            told.warning(0, "", f"{why} for neurons, write one id on each line")
    if kind == "neurons":
        return _Layout(kind, [], {}, question_lines.rows(lines, ",", told))
    if len(cells) not in _UNNAMED:
        expected = ", or ".join(map(", ".join, _UNNAMED.values()))
        raise Stop(line, f"the line has {_count(cells)}; a position is {expected}")
    if len(cells) < len(given):
        raise Stop(
            line,
            "the line ends with an empty cell, so the columns are not clear; add a "
            "first line that names the columns, for example id,x,y,z",
        )
    names = list(_UNNAMED[len(cells)])
    places = {_ROLES[name]: place for place, name in enumerate(names)}
    return _Layout(kind, names, places, question_lines.rows(lines, delimiter, told))


class _Rows:
    """The checks that rows of both kinds share: the number of rows and of cells."""

    def __init__(self, layout: _Layout, told: Told, most: int) -> None:
        self._names, self._places = layout.names, layout.places
        self._told, self._most = told, most
        self.count = 0

    def _begin(self, line: int) -> None:
        if self.count >= self._most:
            why = f"there are more than {self._most:,} rows; split the request"
            raise Stop(line, why)
        self.count += 1

    def _fits(self, line: int, cells: list[str]) -> bool:
        """Returns whether each name has a cell; ignores empty cells at the end."""
        beyond = cells[len(self._names) :]
        if len(cells) >= len(self._names) and not any(map(str.strip, beyond)):
            return True
        self._told.error(
            line,
            "",
            f"the row has {_count(cells)}, but the first line has {len(self._names)}; "
            "add or remove cells, or quote the cell that contains the separator",
        )
        return False

    def _left_out(self, line: int, cells: list[str]) -> bool:
        """Returns whether the row is empty, as below the tables of spreadsheets."""
        if any(map(str.strip, cells)):
            return False
        self._told.warning(line, "", "the row is empty; it is left out")
        return True


class _Neurons(_Rows):
    """Rows with one neuron each. Without a header, a row can have many neurons."""

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
            why = f"{again:,} {what} repeated; each neuron is answered once"
            self._told.warning(0, "", why)
        return Asked("neurons", pa.table([ids[np.sort(first)]], schema=NEURONS))


class _Positions(_Rows):
    """Rows with x, y and z, and optionally an id and a neuron."""

    def __init__(self, layout: _Layout, told: Told, most: int) -> None:
        super().__init__(layout, told, most)
        self._axes = [self._places[axis] for axis in _AXES]
        self._id, self._neuron = map(self._places.get, ("id", "neuron"))
        self._ids, self._neurons = array.array("q"), array.array("q")
        self._xyz = array.array("d")

    def add(self, line: int, cells: list[str]) -> None:
        # Without ids, a position is recognised by its row number. Therefore no row is
        # left out.
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
        self._told.warning(line, "", f"{what}; the answer has the status bad_position")

    def _tell(self, line: int, cells: list[str]) -> None:
        """Reports every wrong cell of the row."""
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
