# SPDX-License-Identifier: Apache-2.0
"""What the files that other tools read have in common: names, ids, how to write them.

exports_synapses.py makes those with a row a synapse, exports_neurons.py those with a
row a neuron; docs/exports.md says what is in each. In all of them classes are found by
name; a class that a file always has and the network has not is 0 where there is a
prediction; probabilities are NaN (CSV: blank) where there is none; an id that is not
known is 0, because of a null pandas makes the whole column floats, which lose digits
of large ids.
"""

import contextlib
import dataclasses
import gzip
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions

_FAFB = ("gaba", "acetylcholine", "glutamate", "octopamine", "serotonin", "dopamine")
_BANC = ("acetylcholine", "dopamine", "gaba", "glutamate")
_BANC += ("histamine", "octopamine", "serotonin", "tyramine")
# Class → what the consumer calls it, in the consumer's order. FlyEM says "unknown" for
# "neither" (flyem-snapshot, `translate-names`).
NAMES: Mapping[str, Mapping[str, str]] = {
    "flyem": {name: name for name in synapses.CLASSES} | {"neither": "unknown"},
    "fafbseg": {name: name for name in _FAFB},
    "cave": dict(zip(_FAFB, ("gaba", "ach", "glut", "oct", "ser", "da"), strict=True)),
    "codex": {
        "dopamine": "DA",
        "serotonin": "SER",
        "gaba": "GABA",
        "glutamate": "GLUT",
        "acetylcholine": "ACH",
        "octopamine": "OCT",
    },
    "neuprint": {name: name.capitalize() for name in synapses.CLASSES}
    | {"neither": "Unknown"},
    "banc": {name: name for name in _BANC},
    "synister": {name: name for name in synapses.CLASSES},
}
# These find a synapse's neuron, or have a row for each neuron.
NEEDS_NEURONS = ("flyem", "fafbseg", "codex", "neuprint", "banc")

Convert = Callable[[pa.Table], pa.Table]


def prepare(source: Predictions, to: str, drop_classes: Sequence[str]) -> Predictions:
    """The table as the consumer can have it: checked, without the dropped classes.

    A dropped class is as though the network did not have it: rows are called among the
    others, and no probability is rescaled.

    Raises:
      UserError: a class that the consumer has no column for, or is not there to drop;
        no row names a neuron, where the consumer needs them.
    """
    for name in drop_classes:
        if name not in source.classes:
            raise UserError(
                f"--drop_classes={name}: {source.path} is of the classes "
                f"{', '.join(source.classes)}"
            )
    classes = [name for name in source.classes if name not in drop_classes]
    names = NAMES[to]
    for name in classes:
        if name not in names:
            raise UserError(
                f"--to={to} has no column for {name!r} (it has {', '.join(names)}): "
                f"choose another, or leave it out with --drop_classes={name}"
            )
    if not classes or len({names[name] for name in classes}) < len(classes):
        raise UserError(
            f"--to={to} cannot tell the classes {', '.join(classes) or '(none)'} "
            "apart: choose others with --drop_classes"
        )
    if to in NEEDS_NEURONS and not any_value(source, "neuron_id"):
        raise UserError(
            f"{source.path} names no neuron (neuron_id is empty), and --to={to} needs "
            "them: predict a table that has neuron_id"
        )
    gone = [predictions.probability_column(name) for name in drop_classes]
    kept = [field for field in source.schema if field.name not in gone]
    about = json.dumps(source.about | {"classes": classes})
    schema = pa.schema(kept, {"synister_jax": about})
    return dataclasses.replace(source, schema=schema)


def any_value(source: Predictions, column: str) -> bool:
    """Whether a row of the column is not null."""
    tables = source.tables([column])
    return any(table[column].null_count < len(table) for table in tables)


def write(
    path: pathlib.Path, source: Predictions, convert: Convert, silent: bool = False
) -> int:
    """Writes all rows, streamed through `convert`; returns how many it gave.

    The name says how: .feather, .parquet, .csv or .csv.gz. Whole or not at all.
    """
    rows = 0
    progress = Progress(path.name, source.rows, "rows", silent=silent)
    schema = _described(convert(source.schema.empty_table()), source).schema
    with _sink(path, schema) as sink:
        for table in source.tables():
            converted = convert(table)
            sink.write_table(_described(converted, source))
            rows += len(converted)
            progress.add(len(table))
    return rows


def write_table(path: pathlib.Path, table: pa.Table, source: Predictions) -> None:
    """Writes what was made of `source` and is in memory, as `write` does."""
    table = _described(table, source)
    with _sink(path, table.schema) as sink:
        sink.write_table(table)


def _described(table: pa.Table, source: Predictions) -> pa.Table:
    """With the metadata of the predictions: run, step, volume, classes."""
    return table.replace_schema_metadata(source.schema.metadata)


@contextlib.contextmanager
def _sink(path: pathlib.Path, schema: pa.Schema) -> Iterator[Any]:
    if path.suffix in (".feather", ".parquet"):
        with synapses.writer(path, schema) as sink:
            yield sink
        return
    # A header by us: Arrow would put its names in quotes.
    options = csv.WriteOptions(include_header=False, quoting_style="needed")
    with contextlib.ExitStack() as opened:
        partial = opened.enter_context(files.replacing(path))
        file = opened.enter_context(partial.open("wb"))
        if path.suffix == ".gz":  # without name and time: the same bytes every time
            zipped = gzip.GzipFile("", "wb", 6, file, mtime=0)
            file = opened.enter_context(zipped)
        file.write((",".join(schema.names) + "\n").encode())
        yield opened.enter_context(csv.CSVWriter(file, schema, write_options=options))


def blank(values: np.ndarray) -> pa.Array:
    """With nulls, which CSV leaves blank, for NaN."""
    return pa.array(values, from_pandas=True)


def ids(table: pa.Table, column: str) -> pa.ChunkedArray | pa.Array:
    """int64, 0 where unknown, or for a table without the column."""
    if column not in table.column_names:
        return pa.array(np.zeros(len(table), np.int64))
    return pc.fill_null(table[column], 0)


def score(table: pa.Table, column: str) -> np.ndarray:
    """float32 [n], NaN where unknown, or for a table without the column."""
    if column not in table.column_names:
        return np.full(len(table), np.nan, np.float32)
    return pc.fill_null(table[column], np.nan).to_numpy().astype(np.float32)


def probability(table: pa.Table, name: str) -> np.ndarray:
    return table[predictions.probability_column(name)].to_numpy()


def fixed(table: pa.Table, to: str) -> dict[str, np.ndarray]:
    """A float32 column for every class that the consumer has, NaN if not predicted."""
    absent = np.where(predictions.called(table) >= 0, 0, np.nan).astype(np.float32)
    classes = predictions.classes(table)
    return {
        column: probability(table, name) if name in classes else absent
        for name, column in NAMES[to].items()
    }
