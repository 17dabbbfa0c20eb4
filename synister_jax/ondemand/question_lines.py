# SPDX-License-Identifier: Apache-2.0
"""Reads lines and rows of a request in bounded memory, and collects its problems."""

import codecs
import csv
import dataclasses
from collections.abc import Iterator
from typing import BinaryIO

# The largest length of a line, and of a row with line breaks in quoted cells.
MOST_LINE_BYTES = 1 << 16
MOST_TOLD = 100  # this many errors and this many warnings are kept


@dataclasses.dataclass(frozen=True)
class LineProblem:
    """An error or a warning about a line of a request."""

    line: int  # from 1, as in an editor; 0 for the whole text
    column: str  # the name of the column; "" for the whole row
    message: str  # what is wrong, and what to do

    def __str__(self) -> str:
        if not self.line:
            return self.message
        column = f", column {self.column}" if self.column else ""
        return f"line {self.line}{column}: {self.message}"


class Stop(Exception):
    """An error after which nothing more is read."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class Told:
    """The first `MOST_TOLD` errors and warnings, and the numbers of all of them."""

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
    """The lines of a stream as text. A line ends with LF, CR LF or CR.

    A line that is not UTF-8 is reported as an error. UTF-16, a NUL byte, a row of more
    than `MOST_LINE_BYTES` and more than `most` lines raise `Stop`.
    """

    def __init__(self, stream: BinaryIO, told: Told, most: int) -> None:
        self._lines, self._told, self._most = _split(stream), told, most
        self._again: str | None = None
        self.number = 0  # the number of the last line that was returned
        self.begin()

    def begin(self) -> None:
        """Marks the next line as the begin of a row."""
        self.first, self._bytes = self.number + 1, 0

    def peek(self) -> str | None:
        """Returns the next line that is not blank. The next read returns it again."""
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
                raise Stop(1, "the text is UTF-16; save the text as CSV in UTF-8")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if b"\0" in raw:
            why = "the line has a NUL byte; save the text as CSV in UTF-8"
            raise Stop(self.number, why)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._told.error(
                self.number, "", "the line is not UTF-8; save the text as CSV in UTF-8"
            )
            return raw.decode(errors="replace")

    def _require_bounds(self) -> None:
        if self.number > self._most:
            why = f"the text has more than {self._most:,} lines; remove blank lines"
            raise Stop(self.number, why)
        if self._bytes <= MOST_LINE_BYTES:
            return
        if self.first < self.number:
            why = "a quotation mark is opened and not closed; close or remove the mark"
            raise Stop(self.first, why)
        why = f"the line is longer than {MOST_LINE_BYTES:,} bytes; split the line"
        raise Stop(self.first, why)


def _split(stream: BinaryIO) -> Iterator[bytes]:
    """Yields lines with their ends; stops after the first part of a too long line."""
    rest = b""
    while chunk := stream.read(MOST_LINE_BYTES):
        lines = (rest + chunk).splitlines(keepends=True)
        # The LF that belongs to a CR may be in the next chunk.
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        yield from lines
        if len(rest) > MOST_LINE_BYTES:
            yield rest
            return
    yield from rest.splitlines(keepends=True)


def rows(lines: Lines, delimiter: str, told: Told) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of the first line, and the cells, of each row.

    Blank lines are left out. An unclear quotation mark is reported as an error.

    Args:
      lines: the lines of the request.
      delimiter: the separator of cells; "" for white space.
      told: collects the errors.
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
                "a quotation mark is not closed, or is inside a cell; quote whole "
                'cells, and write "" for a mark inside a cell',
            )
            continue
        if not delimiter:
            row = _parts(row)
        # A line of white space gives one blank cell.
        if len(row) > 1 or (row and row[0].strip()):
            yield lines.first, row


def cells(line: str, delimiter: str) -> list[str]:
    """Returns the cells of one line. No cell may continue on the next line."""
    row = next(csv.reader([line], delimiter=delimiter or ","))
    return row if delimiter else _parts(row)


def _parts(row: list[str]) -> list[str]:
    return [part for cell in row for part in cell.split()]
