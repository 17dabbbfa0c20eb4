# SPDX-License-Identifier: Apache-2.0
"""Reads a confusion matrix that `evaluate` has measured or that was published."""

import csv
import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from synister_jax.base import files
from synister_jax.base.errors import UserError

LEVELS = ("synapses", "neurons")


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A confusion matrix, whose rows are true classes and whose columns are calls.

    Attributes:
      name: the name of the source in messages.
      classes: the k classes of the rows and columns.
      counts: float64 [k, k], numbers of synapses or neurons; fractions of the rows
        where the source has no numbers.
      measured: the content of metrics.json; empty where the source is another file.
    """

    name: str
    classes: tuple[str, ...]
    counts: np.ndarray
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def by_row(self) -> np.ndarray:
        """Returns P(called | true), float64 [k, k].

        The row of a class that does not occur is NaN.
        """
        return normalised(self.counts, axis=1)

    def by_column(self) -> np.ndarray:
        """Returns P(true | called), float64 [k, k].

        The column of a class that is never called is NaN.
        """
        return normalised(self.counts, axis=0)

    @property
    def is_of_counts(self) -> bool:
        """Whether all entries are whole numbers, and not fractions."""
        return bool((self.counts == np.round(self.counts)).all())

    def require_rows(self) -> None:
        """Checks that the matrix has counts, or fractions whose rows sum to 1.

        Raises:
          UserError: the entries are fractions, and the sum of a row is not 1.
        """
        if self.is_of_counts:
            return
        total = self.counts.sum(axis=1)
        # Published fractions have two digits: rounding changes each entry by at most
        # 0.005.
        off = np.abs(total - 1) > 0.005 * len(total) + 1e-9
        if wrong := np.flatnonzero(off & (total > 0)).tolist():
            raise UserError(
                f"{self.name}: the row of {self.classes[wrong[0]]} sums to "
                f"{total[wrong[0]]:.2f}, not 1; rows must be P(called | true), but "
                "published tables often have columns of P(true | called); give counts, "
                "or fractions of the rows"
            )

    def for_classes(self, classes: Sequence[str]) -> "Confusion":
        """Returns the matrix with its rows and columns in the order of `classes`.

        Raises:
          UserError: the matrix has other classes.
        """
        if sorted(classes) != sorted(self.classes):
            raise UserError(
                f"{self.name} has the classes {', '.join(self.classes)}, but the "
                f"predictions have {', '.join(classes)}; give the confusion of the "
                "network that made the predictions"
            )
        order = [self.classes.index(name) for name in classes]
        counts = self.counts[np.ix_(order, order)]
        return dataclasses.replace(self, classes=tuple(classes), counts=counts)


def normalised(counts: np.ndarray, axis: int) -> np.ndarray:
    """Returns counts as fractions of their sum along `axis`; NaN where the sum is 0."""
    total = counts.sum(axis=axis, keepdims=True, dtype=np.float64)
    return counts / np.where(total > 0, total, np.nan)


def load(path: str | os.PathLike[str], level: str = "synapses") -> Confusion:
    """Reads a confusion matrix from a metrics.json of `evaluate` or from a CSV file.

    The CSV file names the called classes in its first line and the true classes in its
    first column. Its numbers are counts or fractions of a row.

    Args:
      path: the file, or a folder RUN/evaluation/<part> with a single evaluated step,
        whose metrics.json is read.
      level: the matrix of metrics.json to read, one of `LEVELS`.

    Raises:
      UserError: the file is missing or has another format, a number is negative, or all
        numbers are 0.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _only_step(path)
    measured: dict[str, Any] = {}
    rows: Sequence[Sequence[str | float]]
    if path.suffix == ".csv":
        classes, rows = _read_csv(path)
    else:
        measured = files.read_json(path)
        classes, rows = _of(measured, path, level)
    try:
        counts = np.array(rows, np.float64)
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: a cell of the confusion matrix is missing or not a number; give "
            "a number in every cell"
        ) from None
    k = len(classes)
    if k < 2 or counts.shape != (k, k) or len(set(classes)) < k:
        raise UserError(
            f"{path} names {k} classes, which need {k} rows of {k} numbers; give two "
            "or more classes, each once, and all their numbers"
        )
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        raise UserError(
            f"{path}: the numbers of a confusion matrix must be finite and from 0 up, "
            "and at least one must be above 0"
        )
    return Confusion(str(path), tuple(classes), counts, measured)


def _only_step(folder: pathlib.Path) -> pathlib.Path:
    found = sorted(folder.glob("step-*/metrics.json"))
    if len(found) != 1:
        steps = ", ".join(path.parent.name for path in found) or "none"
        raise UserError(
            f"{folder} must have exactly one evaluated step, but has {steps}; give the "
            "metrics.json of one step"
        )
    return found[0]


def _of(
    content: dict[str, Any], path: pathlib.Path, level: str
) -> tuple[list[str], list[list[float]]]:
    try:
        classes, rows = list(content["classes"]), content[level]["confusion"]
        if content.get("part") not in (None, "test"):
            print(
                f"warning: {path} was measured on the part {content['part']}, not "
                "test: the network makes fewer errors on neurons that it was trained "
                "on or chosen by",
                file=sys.stderr,
            )
        return classes, rows
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{path} has no confusion of {level}; give a metrics.json of "
            "`python -m synister_jax.evaluate`, or a CSV file"
        ) from None


def _read_csv(path: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    rows = [row for row in csv.reader(text.splitlines()) if any(row)]
    classes = rows[0][1:] if rows else []
    if [row[0] for row in rows[1:]] != classes:
        raise UserError(
            f"{path}: the rows must name the classes of the first line, in the same "
            f"order: {', '.join(classes)}"
        )
    return classes, [row[1:] for row in rows[1:]]
