# SPDX-License-Identifier: Apache-2.0
"""Makes the plan of a prediction: it groups the rows of a table into work units.

DuckDB sorts the rows whose crop touches the volume along a space-filling curve over the
chunks of the volume. The table may be larger than memory. The sorted rows are cut into
units of equal size. The crops of a unit are therefore close together, and the next unit
continues next to them.

A plan depends only on the table, the grid of the volume and the shape of a crop.
`plan.json` records what the plan was made from. Row group i of `units.parquet` holds
the rows of unit i.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from synister_jax.base import files, output_folders, sql
from synister_jax.base.progress import Progress
from synister_jax.bulk.options import UNIT_ROWS
from synister_jax.em import crops, spaces
from synister_jax.em.volumes import Volume
from synister_jax.network.inference import Classifier
from synister_jax.tables import predictions, synapse_stream, synapses
from synister_jax.tables.synapse_stream import SynapseStream

_START = [(name, pa.int32()) for name in ("start_z_vx", "start_y_vx", "start_x_vx")]
_UNIT = pa.schema([("row", pa.int64()), *_START])
_CODED = pa.schema([("code", pa.int64()), *_UNIT])
_SAMPLE_ROWS = 100_000


class PlanRecord(TypedDict):
    """The content of plan.json: what a plan is made from, and what planning found."""

    classes: list[str]
    parameters_sha256: list[str]  # one checksum for each network
    views: int
    temperature: NotRequired[float | None]  # absent in older plans
    batch_size: int
    part: list[str] | None  # (split, part) if only the rows of a part are used
    crop_shape_zyx: list[int]
    volume: str
    volume_shape_zyx: list[int]
    chunk_shape_zyx: list[int]
    voxel_size_nm_zyx: list[float]
    offset_nm_zyx: list[float]
    unit_rows: int
    rows: int  # the number of rows of the table
    synapses_sha256: str  # the checksum of the ids and positions of the table
    # The number of rows with each status, as far as positions show the status.
    status_by_position: dict[str, int]
    doubt: str | None  # what seems wrong with the positions


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan in a folder. Its length is the number of units."""

    folder: pathlib.Path
    about: PlanRecord

    @functools.cached_property
    def _file(self) -> parquet.ParquetFile:
        return parquet.ParquetFile(self.folder / "units.parquet")

    def __len__(self) -> int:
        return self._file.num_row_groups

    @property
    def predicted_rows(self) -> int:
        """The number of rows of all units: the rows whose crop touches the volume."""
        return self._file.metadata.num_rows

    @property
    def is_whole(self) -> bool:
        """Whether `units.parquet` can be read and has as many rows as the plan says."""
        counts = self.about["status_by_position"]
        planned = counts.get(crops.OK, 0) + counts.get(crops.PARTLY_OUTSIDE, 0)
        try:
            return self.predicted_rows == planned
        except (OSError, pa.ArrowException):
            return False

    def unit(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of a unit and the first voxels of their crops.

        Returns:
          The rows of the table, [n] int64, and the starts, [n, 3] int64 as (z, y, x).
        """
        table = self._file.read_row_group(number)
        starts = [table[name].to_numpy().astype(np.int64) for name, _ in _START]
        return table["row"].to_numpy(), np.stack(starts, axis=1)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """The SHA-256 checksum of the content of plan.json."""
        return hashlib.sha256(json.dumps(self.about).encode()).digest()

    def size(self, number: int) -> int:
        """Returns the number of rows of a unit."""
        return self._file.metadata.row_group(number).num_rows


def make(
    source: SynapseStream,
    volume: Volume,
    crop_shape_zyx: Sequence[int],
    folder: pathlib.Path,
    unit_rows: int,
    made_from: dict[str, Any],
) -> Plan:
    """Returns the plan in the folder, and makes the plan if the folder has none.

    Args:
      source: the rows of the synapse table.
      volume: the volume from which the crops are read.
      crop_shape_zyx: the shape of a crop in voxels.
      folder: the folder of the plan.
      unit_rows: the number of rows of each unit. The last unit can have fewer rows.
      made_from: further JSON values that must be equal when the folder is used again.

    Raises:
      UserError: the plan in the folder was made with other arguments, or the table has
        changed since.
    """
    path = folder / "plan.json"
    identity = made_from | {
        "crop_shape_zyx": list(map(int, crop_shape_zyx)),
        "volume": volume.uri,
        "volume_shape_zyx": list(volume.shape_zyx),
        "chunk_shape_zyx": list(volume.chunk_shape_zyx),
        "voxel_size_nm_zyx": list(volume.voxel_size_nm_zyx),
        "offset_nm_zyx": list(volume.offset_nm_zyx),
        "unit_rows": unit_rows,
    }
    files.make_folder(folder / "parts")
    with files.locked(folder, wait=True):
        if path.exists():
            output_folders.require_same(path, identity)
        if not path.exists() or not open(folder).is_whole:
            counted = _Counted(source, volume, crop_shape_zyx)
            _write_units(counted, folder, unit_rows)
            files.write_json(path, identity | counted.about())
            return open(folder)
    # The lock is free here, so that several processes can compare at the same time.
    print(f"{source.name}: comparing the table with the plan in {folder}", flush=True)
    found = synapse_stream.checksum(source)
    output_folders.require_same(path, {"rows": found.rows})
    output_folders.require_same(path, {"synapses_sha256": found.hexdigest()})
    return open(folder)


def of_classifier(
    classifier: Classifier,
    source: SynapseStream,
    volume: Volume,
    output: pathlib.Path,
    unit_rows: int = UNIT_ROWS,
) -> Plan:
    """Returns the plan in `output`, and makes the plan if the folder has none.

    Args:
      classifier: the networks. The plan records their parameters.
      source: the rows of the synapse table.
      volume: the volume from which the crops are read.
      output: the folder of the plan and the predictions.
      unit_rows: the number of rows of each unit. The last unit can have fewer rows.

    Raises:
      UserError: the folder holds predictions that were made with other arguments.
    """
    made_from = {
        "classes": list(classifier.classes),
        "parameters_sha256": [m["parameters_sha256"] for m in classifier.members],
        "views": classifier.views,
        "temperature": classifier.temperature,
        "batch_size": classifier.batch_size,
        "part": None if source.part is None else list(source.part),
    }
    shape = tuple(classifier.config.crop_shape_zyx)
    return make(source, volume, shape, files.make_folder(output), unit_rows, made_from)


def open(folder: pathlib.Path) -> Plan:
    """Returns the plan in a folder.

    Raises:
      UserError: plan.json cannot be read.
    """
    return Plan(folder, files.read_json(folder / "plan.json"))


def locate(
    table: pa.Table, shape_zyx: Sequence[int], volume: Volume
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first voxel of each crop, and the status that its position gives it.

    Args:
      table: rows of a synapse table.
      shape_zyx: the shape of a crop in voxels.
      volume: the volume from which the crops are read.

    Returns:
      The starts, [n, 3] int64 as (z, y, x), and the statuses, [n] of str objects. A
      status is `ok`, `partly_outside`, `outside` or `bad_position`.
    """
    positions = synapses.positions_nm_zyx(table)
    # The voxel index of a larger position may not fit into int64. No volume is this
    # large: 2**53 nm are 9,000 km.
    bad = ~(np.abs(positions) < 2.0**53).all(axis=1)
    positions[bad] = 0
    starts = crops.starts_vx_zyx(positions, shape_zyx, volume)
    status = crops.border_status(starts, shape_zyx, volume)
    status[bad] = predictions.BAD_POSITION
    return starts, status


def has_crop(status: np.ndarray) -> np.ndarray:
    """Returns whether the crop of each row touches the volume, [n] bool.

    Args:
      status: the statuses that `locate` returns.
    """
    return (status == crops.OK) | (status == crops.PARTLY_OUTSIDE)


class _Counted:
    """The rows whose crop touches the volume, with a code for the place of each crop.

    While the rows are read, the object also collects the counts, the checksum and the
    sample of positions that `about` needs.
    """

    def __init__(
        self, source: SynapseStream, volume: Volume, shape: Sequence[int]
    ) -> None:
        self._source, self._volume, self._shape = source, volume, shape
        self._checksum = synapse_stream.Checksum()
        self._status = collections.Counter[str]()
        self._sample: list[np.ndarray] = []
        self._stride = 1

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        progress = Progress("plan", None, "rows")
        for table in self._source.tables():
            first_row = self._checksum.rows
            self._checksum.update(table)
            starts, status = locate(table, self._shape, self._volume)
            self._status.update(status.tolist())
            self._keep_some(synapses.positions_nm_zyx(table), first_row)
            kept = np.flatnonzero(has_crop(status))
            starts = starts[kept]
            code = crops.chunk_codes(starts, self._shape, self._volume)
            columns = [code, first_row + kept, *starts.T.astype(np.int32)]
            yield pa.record_batch(list(map(pa.array, columns)), schema=_CODED)
            progress.add(len(table))
        progress.close()

    def _keep_some(self, positions: np.ndarray, first_row: int) -> None:
        """Keeps every stride-th row. The stride doubles if the sample gets too long."""
        kept = positions[-first_row % self._stride :: self._stride]
        self._sample.append(kept.copy())  # a view would keep the batch in memory
        while sum(map(len, self._sample)) > _SAMPLE_ROWS:
            self._sample = [np.concatenate(self._sample)[::2]]
            self._stride *= 2

    def about(self) -> dict[str, Any]:
        """Returns what plan.json says about the rows. All rows must have been read."""
        positions = np.concatenate([np.zeros((0, 3)), *self._sample])
        doubt = spaces.doubt(positions, self._volume)
        if spaces.look_like_voxels(positions, self._volume):
            doubt = (
                f"all {len(positions):,} positions are in the corner of volume "
                f"{self._volume.uri} where voxel indices or micrometres would be; "
                "check that they are in nm"
            )
        if doubt and self._stride > 1:
            doubt = f"in a sample of every {self._stride}th row, {doubt}"
        return {
            "rows": self._checksum.rows,
            "synapses_sha256": self._checksum.hexdigest(),
            "status_by_position": dict(sorted(self._status.items())),
            "doubt": doubt,
        }


def _write_units(counted: _Counted, folder: pathlib.Path, unit_rows: int) -> None:
    names = ", ".join(f'"{name}"' for name in _UNIT.names)
    query = f"""SELECT {names} FROM rows
        ORDER BY code, start_z_vx, start_y_vx, start_x_vx, "row" """
    with (
        files.replacing(folder / "units.parquet") as partial,
        # A dictionary would not save space, because few numbers occur twice.
        parquet.ParquetWriter(
            partial, _UNIT, compression="zstd", use_dictionary=False
        ) as sink,
    ):
        waiting = pa.Table.from_batches([], _UNIT)
        for batch in sql.run(query, _CODED, iter(counted), folder):
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
            while len(waiting) >= unit_rows:
                sink.write_table(waiting.slice(0, unit_rows), row_group_size=unit_rows)
                waiting = waiting.slice(unit_rows)
        if len(waiting):
            sink.write_table(waiting, row_group_size=unit_rows)
