# SPDX-License-Identifier: Apache-2.0
"""Measures a table of predictions and writes the numbers and pictures to a folder."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.evaluation import metrics
from synister_jax.tables import predictions, synapses


@dataclasses.dataclass(frozen=True)
class NeuronSelections:
    """The selections of neurons that are also measured on their own.

    `metrics.measure` measures every pair of the two limits.

    Attributes:
      n_mins: keep neurons with at least this many predicted synapses.
      cutoffs: keep neurons whose call has at least this share of the votes.
    """

    n_mins: tuple[int, ...] = metrics.N_MIN
    cutoffs: tuple[float, ...] = metrics.CUTOFFS

    @classmethod
    def of(cls, n_mins: Sequence[str], cutoffs: Sequence[str]) -> "NeuronSelections":
        """Reads the texts of the flags --n_min and --cutoff.

        Raises:
          UserError: a text is not a number, or the number is out of its range.
        """
        try:
            found = cls(tuple(map(int, n_mins)), tuple(map(float, cutoffs)))
        except ValueError as error:
            raise UserError(
                f"--n_min or --cutoff: {error}; give numbers, whole numbers for --n_min"
            ) from None
        if min(found.n_mins, default=1) < 1:
            raise UserError(f"--n_min={','.join(n_mins)}: give numbers from 1 up")
        if not all(0 <= cutoff <= 1 for cutoff in found.cutoffs):
            raise UserError(f"--cutoff={','.join(cutoffs)}: give shares from 0 to 1")
        return found


def evaluate_table(
    path: pathlib.Path,
    output: pathlib.Path,
    part: tuple[str, str] | None = None,
    selections: NeuronSelections = NeuronSelections(),
) -> dict[str, Any]:
    """Measures a table of predictions and returns the content of metrics.json.

    Args:
      path: the table, which must fit into memory.
      output: the folder for metrics.json and the pictures.
      part: (split, part) to measure only these rows.
      selections: the neurons that are also measured on their own.

    Raises:
      UserError: the file is no prediction table, has no such part, or has no row with a
        known transmitter.
    """
    table = predictions.load(path)
    what = f"all rows of {path.name}"
    if part is not None:
        table = table.filter(pa.array(synapses.in_part(table, *part)))
        what = f"{part[1]} of {path.name}"
    if not (synapses.labels(table, predictions.classes(table)) >= 0).any():
        raise UserError(
            f"{what} has no row whose neurotransmitter is one of the classes "
            f"{', '.join(predictions.classes(table))}: there is nothing to compare with"
        )
    identity = {"predictions": str(path), "part": None if part is None else part[1]}
    return write(files.make_folder(output), what, identity, table, selections)


def write(
    folder: pathlib.Path,
    what: str,
    identity: dict[str, Any],
    table: pa.Table,
    selections: NeuronSelections,
) -> dict[str, Any]:
    """Writes the pictures and then metrics.json, and prints the accuracies.

    Args:
      folder: the folder for metrics.json and the pictures.
      what: the words that name the measured rows in titles and in the printed line.
      identity: the entries of metrics.json that say what was measured.
      table: the predictions.
      selections: the neurons that are also measured on their own.
    """
    from synister_jax.base import figures  # takes half a second to import

    measured = metrics.measure(table, selections.n_mins, selections.cutoffs)
    classes = list(predictions.classes(table))
    lines = [f"{what}:"]
    for name in ("synapses", "neurons"):
        numbers = measured[name]
        shown = figures.confusion(
            np.asarray(numbers["confusion"]),
            classes,
            f"{what}: {numbers['count']:,} {name}, accuracy "
            f"{_shown(numbers['accuracy'])}",
        )
        files.write_bytes(folder / f"confusion_{name}.png", figures.png(shown))
        lines.append(
            f"{numbers['count']:,} {name}, {_shown(numbers['accuracy'])} right"
            f"{_interval(numbers)} "
            f"({_shown(numbers['mean_class_accuracy'])} mean over classes);"
        )
    content = identity | {"classes": classes} | measured
    files.write_json(folder / "metrics.json", content)
    print(" ".join(lines).rstrip(";"), flush=True)
    return content


def _interval(numbers: Mapping[str, Any]) -> str:
    limits = numbers["interval"]["accuracy"]
    return "" if limits is None else " [{:.3f}, {:.3f}]".format(*limits)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
