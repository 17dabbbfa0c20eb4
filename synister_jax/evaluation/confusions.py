# SPDX-License-Identifier: Apache-2.0
"""A confusion matrix, as `evaluate` measured it or as someone published it."""

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
    """How often each class (row) was called each class (column).

    `counts` float64 [k, k] are numbers of synapses or neurons, or fractions of rows
    where the source has no numbers. `measured` is all that metrics.json says, and
    empty where the source is another.
    """

    name: str
    classes: tuple[str, ...]
    counts: np.ndarray
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def by_row(self) -> np.ndarray:
        """P(called | true), float64 [k, k]; NaN in the row of a class not seen."""
        return normalised(self.counts, axis=1)

    def by_column(self) -> np.ndarray:
        """P(true | called), float64 [k, k]; NaN in the column of one never called."""
        return normalised(self.counts, axis=0)

    @property
    def is_of_counts(self) -> bool:
        """Whole numbers, and not fractions."""
        return bool((self.counts == np.round(self.counts)).all())

    def require_rows(self) -> None:
        """Raises `UserError` where it is of fractions, and not of rows' fractions."""
        if self.is_of_counts:
            return
        total = self.counts.sum(axis=1)
        # Each of k entries may be off by half of the last of two digits.
        off = np.abs(total - 1) > 0.005 * len(total) + 1e-9
        if wrong := np.flatnonzero(off & (total > 0)).tolist():
            raise UserError(
                f"{self.name}: the row of {self.classes[wrong[0]]} sums to "
                f"{total[wrong[0]]:.2f}, not 1; rows must be P(called | true), and "
                "published tables often have columns P(true | called): give counts, or "
                "rows"
            )

    def for_classes(self, classes: Sequence[str]) -> "Confusion":
        """The same with rows and columns in the order of `classes`.

        Raises:
          UserError: it has other classes.
        """
        if sorted(classes) != sorted(self.classes):
            raise UserError(
                f"{self.name} is of the classes {', '.join(self.classes)}, not of "
                f"{', '.join(classes)}; give the confusion of the same network"
            )
        order = [self.classes.index(name) for name in classes]
        counts = self.counts[np.ix_(order, order)]
        return dataclasses.replace(self, classes=tuple(classes), counts=counts)


def normalised(counts: np.ndarray, axis: int) -> np.ndarray:
    """Counts as fractions of their sum along `axis`; NaN where that is 0."""
    total = counts.sum(axis=axis, keepdims=True, dtype=np.float64)
    return counts / np.where(total > 0, total, np.nan)


def load(path: str | os.PathLike[str], level: str = "synapses") -> Confusion:
    """Reads `evaluate`'s metrics.json, or a CSV file.

    A folder RUN/evaluation/<part> is the metrics.json of the one step in it.

    The CSV names the called classes in its first line and the true class in the first
    column; its numbers are counts or fractions of a row.

    Args:
      level: of `LEVELS`, which metrics.json has both of.

    Raises:
      UserError: absent, not one of these, negative numbers, nothing counted.
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
        raise UserError(f"{path}: a confusion matrix is all numbers") from None
    k = len(classes)
    if k < 2 or counts.shape != (k, k) or len(set(classes)) < k:
        raise UserError(f"{path}: {k} classes need {k} rows of {k} numbers, each once")
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        raise UserError(
            f"{path}: a confusion matrix counts, from 0 up, and not nothing"
        )
    return Confusion(str(path), tuple(classes), counts, measured)


def _only_step(folder: pathlib.Path) -> pathlib.Path:
    found = sorted(folder.glob("step-*/metrics.json"))
    if len(found) != 1:
        steps = ", ".join(path.parent.name for path in found) or "none"
        raise UserError(
            f"{folder} should have one evaluated step, and has {steps}; give the "
            "metrics.json of one"
        )
    return found[0]


def _of(
    content: dict[str, Any], path: pathlib.Path, level: str
) -> tuple[list[str], list[list[float]]]:
    try:
        classes, rows = list(content["classes"]), content[level]["confusion"]
        if content.get("part") not in (None, "test"):
            print(
                f"warning: {path} is of part {content['part']}, not test: on neurons "
                "that the network was trained on, or chosen by, it errs less",
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
            f"{path}: rows must be of the classes that the first line names, in its "
            f"order: {', '.join(classes)}"
        )
    return classes, [row[1:] for row in rows[1:]]
