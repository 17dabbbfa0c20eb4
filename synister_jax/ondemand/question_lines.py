# SPDX-License-Identifier: Apache-2.0
"""Lines and rows of a request from anyone, in bounded memory, with what is wrong."""

import codecs
import csv
import dataclasses
from collections.abc import Iterator
from typing import BinaryIO

MOST_LINE_BYTES = 1 << 16  # of a line, and of a row with line breaks in quoted cells
MOST_TOLD = 100  # errors, and warnings, that are kept


@dataclasses.dataclass(frozen=True)
class LineProblem:
    """Something to mend, or to know."""

    line: int  # from 1, as an editor counts; 0 for the whole
    column: str  # "" for the row
    message: str  # what is the matter, and what to do

    def __str__(self) -> str:
        if not self.line:
            return self.message
        column = f", column {self.column}" if self.column else ""
        return f"line {self.line}{column}: {self.message}"


class Stop(Exception):
    """An error after which nothing is read."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class Told:
    """Errors and warnings: the first `MOST_TOLD`, and how many there were."""

    def __init__(self) -> None:
        self.errors: list[LineProblem] = []
        self.warnings: list[LineProblem] = []
        self.error_count = self.warning_count = 0

    def error(self, line: int, column: str, message: str) -> None:
        self.error_count += 1
        if len(self.errors) < MOST_TOLD:
            self.errors.append(LineProblem(line, column, message))

    def warning(self, line: int, column: str, message: str) -> None:
        self.warning_count += 1
        if len(self.warnings) < MOST_TOLD:
            self.warnings.append(LineProblem(line, column, message))


class Lines:
    """Lines of a stream as text: those that end in LF, CR LF or CR.

    What is not UTF-8 is told. UTF-16, a NUL, a row of more than `MOST_LINE_BYTES` and
    more than `most` lines are a `Stop`.
    """

    def __init__(self, stream: BinaryIO, told: Told, most: int) -> None:
        self._lines, self._told, self._most = _split(stream), told, most
        self._again: str | None = None
        self.number = 0  # of the last line given
        self.begin()

    def begin(self) -> None:
        """The next line begins a row."""
        self.first, self._bytes = self.number + 1, 0

    def peek(self) -> str | None:
        """The next line that is not blank; it is still to come."""
        for line in self:
            if line.strip():
                self._again = line
                self.number -= 1
                break
            self.begin()
        self.begin()
        return self._again

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again is not None:
            line, self._again = self._again, None
            self.number += 1
            self._bytes += len(line)
            return line
        raw = next(self._lines)
        self.number += 1
        self._bytes += len(raw)
        self._require_bounds()
        if self.number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise Stop(1, "the text is UTF-16; save it as CSV in UTF-8")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if b"\0" in raw:
            why = "holds a NUL byte, so it is not CSV in UTF-8; save it as that"
            raise Stop(self.number, why)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._told.error(self.number, "", "is not UTF-8; save it as CSV in UTF-8")
            return raw.decode(errors="replace")

    def _require_bounds(self) -> None:
        if self.number > self._most:
            why = f"is beyond {self._most:,} lines; leave out what is not a row"
            raise Stop(self.number, why)
        if self._bytes <= MOST_LINE_BYTES:
            return
        if self.first < self.number:
            why = "a quotation mark is opened and not closed; close it, or remove it"
            raise Stop(self.first, why)
        why = f"is longer than {MOST_LINE_BYTES:,} bytes; write it in several lines"
        raise Stop(self.first, why)


def _split(stream: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long a part, and then no more."""
    rest = b""
    while chunk := stream.read(MOST_LINE_BYTES):
        lines = (rest + chunk).splitlines(keepends=True)
        # The LF of a CR may be yet to come.
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        yield from lines
        if len(rest) > MOST_LINE_BYTES:
            yield rest
            return
    yield from rest.splitlines(keepends=True)


def rows(lines: Lines, delimiter: str, told: Told) -> Iterator[tuple[int, list[str]]]:
    """First line and cells of each row, blank lines left out.

    Args:
      delimiter: between cells; "" for white space.
    """
    reader = csv.reader(lines, delimiter=delimiter or ",", strict=True)
    while True:
        lines.begin()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            told.error(
                lines.first,
                "",
                "a quotation mark is not closed, or stands within a cell; quote whole "
                'cells, and write "" for one within',
            )
            continue
        if not delimiter:
            row = _parts(row)
        # Of a line of white space there is one blank cell.
        if len(row) > 1 or (row and row[0].strip()):
            yield lines.first, row


def cells(line: str, delimiter: str) -> list[str]:
    """The cells of one line, by itself; as `rows` where no cell goes beyond it."""
    row = next(csv.reader([line], delimiter=delimiter or ","))
    return row if delimiter else _parts(row)


def _parts(row: list[str]) -> list[str]:
    return [part for cell in row for part in cell.split()]
