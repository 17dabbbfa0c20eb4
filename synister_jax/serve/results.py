# SPDX-License-Identifier: Apache-2.0
"""Reads pages of the neurons and the synapses of an answer from its Feather file.

The file is read piece by piece. The memory holds one piece (65,536 rows, as Arrow
writes them) and the neurons of the last eight answers that were asked for.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.pages import neurons_table
from synister_jax.serve import schemas
from synister_jax.tables import predictions, synapses

NONE = "none"  # the value of `called` that selects rows without a prediction
_CACHED = 8


@dataclasses.dataclass(frozen=True)
class _Neurons:
    """The n neurons of an answer, in the order of the answer."""

    classes: tuple[str, ...]
    ids: np.ndarray  # int64 [n]
    synapses: np.ndarray  # int64 [n]
    counts: np.ndarray  # int64 [n, classes], synapses called for each class
    texts: pa.Array  # the ids as strings, for the search


@dataclasses.dataclass(frozen=True)
class Filter:
    """The conditions that a synapse must meet; None stands for no condition."""

    search: str | None = None  # a part of the id of the position or of the neuron
    status: str | None = None
    called: str | None = None  # a class, or `NONE`
    neuron_id: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether all synapses meet the conditions."""
        return self == Filter()


def neurons_page(
    path: pathlib.Path, search: str | None, offset: int, limit: int
) -> schemas.Neurons:
    """Returns a page of the neurons of an answer, in the order of the answer.

    Args:
      path: The Feather file with the predictions.
      search: Only neurons whose id contains this text are returned; None for all.
      offset: The number of neurons to skip.
      limit: The largest number of neurons to return.
    """
    found = _neurons(path, path.stat().st_mtime_ns)
    rows = np.arange(len(found.ids))
    if search:
        rows = np.flatnonzero(pc.match_substring(found.texts, search).to_numpy(False))
    page = rows[offset : offset + limit]
    return schemas.Neurons(total=len(rows), neurons=[_neuron(found, i) for i in page])


def _neuron(found: _Neurons, row: int) -> schemas.Neuron:
    counts = found.counts[row]
    predicted = int(counts.sum())
    # If several classes have the same count, the first wins, as in the rule `majority`.
    first = int(counts.argmax())
    return schemas.Neuron(
        neuron_id=str(found.ids[row]),
        synapses=int(found.synapses[row]),
        predicted=predicted,
        called=found.classes[first] if predicted else None,
        counts=dict(zip(found.classes, counts.tolist(), strict=True)),
        uncertain=bool(neurons_table.doubts(counts.tolist())),
    )


@functools.lru_cache(maxsize=_CACHED)
def _neurons(path: pathlib.Path, _changed: int) -> _Neurons:
    source = predictions.open(path)
    classes = source.classes
    names = [predictions.probability_column(name) for name in classes]
    pieces = []
    for table in source.tables(["neuron_id", *names]):
        table = table.filter(pc.is_valid(table["neuron_id"]))
        called = predictions.called(table)
        pieces.append((table["neuron_id"].to_numpy(), called))
    ids, called = map(np.concatenate, zip(*pieces, strict=True))
    distinct, first, place = np.unique(ids, return_index=True, return_inverse=True)
    counts = np.zeros((len(distinct), len(classes)), np.int64)
    np.add.at(counts, (place[called >= 0], called[called >= 0]), 1)
    order = np.argsort(first)
    return _Neurons(
        classes,
        distinct[order],
        np.bincount(place, minlength=len(distinct))[order],
        counts[order],
        pc.cast(pa.array(distinct[order]), pa.string()),
    )


def synapses_page(
    path: pathlib.Path, wanted: Filter, offset: int, limit: int
) -> schemas.Synapses:
    """Returns a page of the synapses of an answer, in the order of the answer.

    Args:
      path: The Feather file with the predictions.
      wanted: The conditions that the synapses must meet.
      offset: The number of these synapses to skip.
      limit: The largest number of synapses to return.
    """
    source = predictions.open(path)
    classes = source.classes
    total = 0
    rows: list[schemas.Synapse] = []
    for table in source.tables(_columns(classes)):
        if not wanted.is_empty:
            table = table.filter(_mask(table, wanted, classes))
        first = max(0, offset - total)
        page = table.slice(first, limit - len(rows))
        total += len(table)
        rows += _synapses(page, classes)
    return schemas.Synapses(total=total, rows=rows)


def _columns(classes: Sequence[str]) -> list[str]:
    names = [predictions.probability_column(name) for name in classes]
    return ["synapse_id", "neuron_id", *synapses.POSITION, "status", *names]


def _mask(table: pa.Table, wanted: Filter, classes: Sequence[str]) -> pa.ChunkedArray:
    masks = []
    if wanted.search:
        in_id, in_neuron = (
            pc.match_substring(pc.cast(table[name], pa.string()), wanted.search)
            for name in ("synapse_id", "neuron_id")
        )
        masks.append(pc.or_(in_id, pc.fill_null(in_neuron, False)))
    if wanted.status is not None:
        masks.append(pc.equal(table["status"], wanted.status))
    if wanted.called is not None:
        names = [NONE, *classes]
        place = names.index(wanted.called) if wanted.called in names else len(names)
        masks.append(pa.chunked_array([predictions.called(table) == place - 1]))
    if wanted.neuron_id is not None:
        neuron = pa.scalar(wanted.neuron_id, pa.int64())
        masks.append(pc.fill_null(pc.equal(table["neuron_id"], neuron), False))
    return functools.reduce(pc.and_, masks)


def _synapses(table: pa.Table, classes: Sequence[str]) -> list[schemas.Synapse]:
    called = predictions.called(table)
    names = [predictions.probability_column(name) for name in classes]
    return [
        schemas.Synapse(
            position_id=str(row["synapse_id"]),
            neuron_id=None if row["neuron_id"] is None else str(row["neuron_id"]),
            x=_number(row["x_nm"]),
            y=_number(row["y_nm"]),
            z=_number(row["z_nm"]),
            status=row["status"],
            called=classes[place] if place >= 0 else None,
            probabilities={
                name: _number(row[column])
                for name, column in zip(classes, names, strict=True)
            },
        )
        for row, place in zip(table.to_pylist(), called, strict=True)
    ]


def _number(value: float | None) -> float | None:
    """Returns None for NaN and infinity, which JSON does not have."""
    return value if value is not None and np.isfinite(value) else None
