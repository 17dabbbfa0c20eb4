# SPDX-License-Identifier: Apache-2.0
"""Merges the results of all units into predictions for every row of the table.

The predictions have the order of the table. DuckDB sorts the results by row, and the
table is read once more next to them. Results and table may be larger than memory. Each
row whose crop touches the volume must have exactly one prediction, and the table must
not have changed since it was planned. Otherwise nothing is written.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NotRequired, cast

import numpy as np
import pyarrow as pa
from pyarrow import parquet

import synister_jax
from synister_jax.base import files, sql
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.bulk import grids, planning, unit_results
from synister_jax.bulk.options import FORMATS
from synister_jax.bulk.planning import Plan, PlanRecord
from synister_jax.em import crops
from synister_jax.em.volumes import Volume
from synister_jax.network.inference import Classifier
from synister_jax.tables import predictions, synapse_stream, synapses
from synister_jax.tables.synapse_stream import SynapseStream

# Each Parquet file of a folder has about this many rows.
_FILE_ROWS = 1 << 22


class PredictionsRecord(PlanRecord):
    """The content of predictions.json: the plan, the networks and the results."""

    members: list[dict[str, Any]]  # run, step, parameters_sha256, … of each network
    synapses: str  # the name of the table
    abstain_below: NotRequired[float | None]  # only with a temperature
    file: str  # the name of the predictions in the folder
    status: dict[str, int]  # the number of rows with each status
    unreadable_chunks: int
    config: dict[str, Any]  # the configuration of the networks
    written_by: str
    versions: dict[str, str]


@dataclasses.dataclass
class Merged:
    """The statuses and the unreadable chunks that merging found.

    The values are complete when all tables of `tables` have been read.
    """

    status: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    unreadable: set[crops.Corner] = dataclasses.field(default_factory=set)


def tables(
    plan: Plan,
    source: SynapseStream,
    volume: Volume,
    about: dict[str, Any],
    merged: Merged,
) -> Iterator[pa.Table]:
    """Yields tables of predictions (predictions.py), which together hold all rows.

    At least one table is yielded.

    Args:
      about: what made the predictions. It is stored in each table.
      merged: the object into which the statuses and unreadable chunks are written.

    Raises:
      UserError: the result of a unit is missing or damaged, the synapse table has
        changed, or the disk is full.
    """
    classes = plan.about["classes"]
    total = plan.about["rows"]
    progress = Progress("merge", total, "rows")
    predicted = _Sorted(plan, merged.unreadable)
    checksum = synapse_stream.Checksum()
    for table in source.tables():
        first = checksum.rows
        checksum.update(table)
        _, status = planning.locate(table, plan.about["crop_shape_zyx"], volume)
        expected = np.flatnonzero(planning.has_crop(status))
        rows, whole, values = predicted.before(first + len(table))
        if not np.array_equal(rows, first + expected):
            raise UserError(
                f"{source.name}: the results in {plan.folder} do not have exactly one "
                f"prediction for each of the rows {first:,} to {first + len(table):,}; "
                "the table may have changed during the prediction; choose another "
                "--output"
            )
        status[expected[~whole]] = crops.MISSING_DATA
        probabilities = np.full((len(table), len(classes)), np.nan, np.float32)
        probabilities[expected[whole]] = values[whole]
        merged.status.update(status.tolist())
        yield predictions.build(table, probabilities, status, classes, about)
        progress.add(len(table))
    if checksum.hexdigest() != plan.about["synapses_sha256"]:
        raise UserError(
            f"{source.name}: the table has changed during the prediction; choose "
            "another --output"
        )


class _Sorted:
    """The predicted rows of all units in the order of the table."""

    def __init__(self, plan: Plan, unreadable: set[crops.Corner]) -> None:
        self._plan, self._unreadable = plan, unreadable
        names = [f"p{i}" for i in range(len(plan.about["classes"]))]
        floats = [(name, pa.float32()) for name in names]
        self._schema = pa.schema([("row", pa.int64()), ("whole", pa.bool_()), *floats])
        self._names = names
        query = 'SELECT * FROM rows ORDER BY "row"'
        self._batches = sql.run(query, self._schema, self._parts(), plan.folder)
        self._waiting = pa.Table.from_batches([], self._schema)

    def _parts(self) -> Iterator[pa.RecordBatch]:
        for unit in range(len(self._plan)):
            part = unit_results.read(self._plan, unit)
            if part is None:
                path = unit_results.path_of(self._plan, unit)
                raise UserError(
                    f"{path}: the file is missing or damaged; run the command again, "
                    "which creates the file again"
                )
            self._unreadable.update(part.unreadable)
            columns = [part.rows, part.whole, *part.probabilities.T]
            yield pa.record_batch(
                [pa.array(np.ascontiguousarray(c)) for c in columns], self._schema
            )

    def before(self, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (rows, whole, probabilities) of the next rows below `stop`."""
        pieces = [self._waiting]
        while not len(pieces[-1]) or pieces[-1]["row"][-1].as_py() < stop:
            batch = next(self._batches, None)
            if batch is None:
                break
            pieces.append(pa.Table.from_batches([batch]))
        table = pa.concat_tables(pieces)
        end = int(np.searchsorted(table["row"].to_numpy(), stop))
        self._waiting = table.slice(end)
        table = table.slice(0, end)
        values = [table[name].to_numpy() for name in self._names]
        return table["row"].to_numpy(), table["whole"].to_numpy(), np.stack(values, 1)


def write_feather(path: pathlib.Path, answer: Iterator[pa.Table]) -> None:
    """Writes the tables into one Feather file, batch by batch.

    Raises:
      UserError: the file cannot be written.
    """
    first = next(answer)
    with synapses.writer(path, first.schema) as sink:
        for table in itertools.chain([first], answer):
            sink.write_table(table.combine_chunks())


def write_parquet(folder: pathlib.Path, answer: Iterator[pa.Table]) -> None:
    """Writes the tables into a folder of Parquet files with some million rows each.

    Sorted by name, the files have the order of the tables.

    Raises:
      UserError: the folder cannot be written.
    """
    with files.replacing_folder(folder) as partial, contextlib.ExitStack() as opened:
        rows, number = _FILE_ROWS, 0
        for table in answer:
            if rows >= _FILE_ROWS:
                opened.close()
                path = partial / f"part-{number:05d}.parquet"
                sink = parquet.ParquetWriter(path, table.schema, compression="zstd")
                opened.enter_context(sink)
                rows, number = 0, number + 1
            sink.write_table(table)
            rows += len(table)


Write = Callable[[pathlib.Path, Iterator[pa.Table]], None]
WRITERS: dict[str, Write] = {"feather": write_feather, "parquet": write_parquet}


def finish(
    plan: Plan,
    classifier: Classifier,
    source: SynapseStream,
    volume: Volume,
    file_format: str = "feather",
    grid: grids.Grid | None = None,
    abstain_below: float | None = None,
) -> PredictionsRecord:
    """Merges the results of all units, and returns the content of predictions.json.

    Each row has one of these statuses:

    - `ok`: the whole crop is inside the volume.
    - `partly_outside`: voxels outside the volume are 0, as in training.
    - `outside`: no voxel of the crop is inside the volume.
    - `missing_data`: a chunk is missing or cannot be decoded.
    - `bad_position`: a coordinate is missing or not finite.

    Rows with one of the last three statuses have no probabilities.

    Args:
      file_format: a key of `options.FORMATS`.
      grid: the grid whose points are the source. With a grid, the predictions are
        written as a Zarr volume.
      abstain_below: stored with the temperature, if the classifier has one
        (calibrate.py).

    Raises:
      UserError: the result of a unit is missing or damaged, the synapse table has
        changed, or a file cannot be written.
    """
    about: dict[str, Any] = {
        "members": classifier.members,
        "views": classifier.views,
        "volume": volume.uri,
        "synapses": source.name,
    }
    if classifier.temperature is not None:
        about["temperature"] = classifier.temperature
        about["abstain_below"] = abstain_below
    merged = Merged()
    with files.locked(plan.folder, wait=True):
        answer = tables(plan, source, volume, about, merged)
        if grid is not None:
            pieces = map(predictions.probabilities, answer)
            name = "predictions.zarr"
            grids.write_zarr(
                plan.folder / name, grid, classifier.classes, pieces, about
            )
        else:
            name = FORMATS[file_format]
            WRITERS[file_format](plan.folder / name, answer)
        for other in FORMATS.values():
            if other != name:  # from an earlier run with another format
                files.remove(plan.folder / other)
        _write_unreadable(plan.folder, merged)
        record: dict[str, Any] = {
            **plan.about,
            **about,
            "file": name,
            "status": dict(sorted(merged.status.items())),
            "unreadable_chunks": len(merged.unreadable),
            "config": json.loads(classifier.config.to_json_best_effort()),
            "written_by": f"synister_jax {synister_jax.__version__}",
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("jax", "flax", "tensorstore", "pyarrow", "duckdb")
            },
        }
        if classifier.temperature is None:
            record.pop("temperature", None)  # older plans have no such key
        files.write_json(plan.folder / "predictions.json", record)
        # Processes that were killed have left these files.
        for left in (plan.folder / "parts").glob("*.partial"):
            left.unlink(missing_ok=True)
    return cast(PredictionsRecord, record)


def _write_unreadable(folder: pathlib.Path, merged: Merged) -> None:
    path = folder / "unreadable_chunks.csv"
    if not merged.unreadable:
        path.unlink(missing_ok=True)
        return
    lines = [",".join(map(str, corner)) for corner in sorted(merged.unreadable)]
    files.write_text(path, "\n".join(["z_vx,y_vx,x_vx", *lines]) + "\n")
