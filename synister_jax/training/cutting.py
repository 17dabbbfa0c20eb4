# SPDX-License-Identifier: Apache-2.0
"""Cuts crops out of a volume into a folder of shards, which shards.py describes."""

import collections
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from pyarrow import feather

import synister_jax
from synister_jax.base import files, output_folders
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.em import crops, volumes
from synister_jax.tables import synapses
from synister_jax.training import shards
from synister_jax.training.shards import Shards

MISSING_CLASS = "no_class"
# These columns decide which crops are cut. All others can change afterwards.
_DECIDE_CROPS = ("synapse_id", *synapses.POSITION, "neurotransmitter")
# group_size is 1 because Grain reads single records. The records are not compressed,
# because EM looks like noise to a compressor: zstd saves 3 to 11 % at any level, and
# crops are written and read half as fast (benchmarks/bench_shard.py).
_WRITER_OPTIONS = "group_size:1,uncompressed"


def write(
    folder: str | pathlib.Path,
    table: pa.Table,
    volume: volumes.Volume,
    *,
    crop_shape_zyx: Sequence[int],
    margin_vx_zyx: Sequence[int],
    classes: Sequence[str],
    shard_bytes: int = 128 << 20,
    made_with: Mapping[str, Any] | None = None,
) -> Shards:
    """Cuts the crop of every synapse that has one of `classes`, and returns the shards.

    Each shard covers neighbouring chunks and depends only on the arguments. It appears
    by renaming, and a later start keeps it. So the finished folder does not depend on
    how often the work was interrupted. A row gets no record if it has no class, if its
    crop is completely outside the volume, or if chunks are missing. The manifest counts
    these rows, and `dropped.feather` lists them with the reason.

    Args:
      folder: the folder of the shards.
      table: the synapses.
      volume: the volume.
      crop_shape_zyx: the voxels of a crop.
      margin_vx_zyx: the voxels of context on either side of a crop.
      classes: the classes of the network.
      shard_bytes: the raw size of a shard.
      made_with: the options that made the table. The manifest records them, and a
        folder that was made with other options is refused.

    Raises:
      UserError: no row can be cut, the folder holds shards of other arguments, or the
        disk is full.
    """
    folder = files.make_folder(folder)
    record_shape = shards.record_shape_zyx(crop_shape_zyx, margin_vx_zyx)
    starts = crops.starts_vx_zyx(
        synapses.positions_nm_zyx(table), crop_shape_zyx, volume
    )
    status = crops.border_status(starts, crop_shape_zyx, volume)
    has_class = synapses.labels(table, classes) >= 0
    rows = np.flatnonzero(has_class & (status != crops.OUTSIDE))
    if not len(rows):
        raise UserError(
            f"no row can be cut: of {len(table):,} synapses {has_class.sum():,} have "
            f"one of the classes {', '.join(classes)}, and none of these lies in the "
            "volume; a table with known neurotransmitters in the volume's frame is "
            "needed"
        )
    rows = rows[crops.order(starts[rows], crop_shape_zyx, volume)]
    per_shard = max(1, shard_bytes // math.prod(record_shape))
    shard_rows = np.array_split(rows, math.ceil(len(rows) / per_shard))
    plan = {
        "format": shards.FORMAT,
        **(made_with or {}),
        "volume": volume.uri,
        "volume_shape_zyx": list(volume.shape_zyx),
        "voxel_size_nm_zyx": list(volume.voxel_size_nm_zyx),
        "offset_nm_zyx": list(volume.offset_nm_zyx),
        "synapses_sha256": files.sha256_of_columns(table, _DECIDE_CROPS),
        "classes": list(classes),
        "crop_shape_zyx": list(map(int, crop_shape_zyx)),
        "margin_vx_zyx": list(map(int, margin_vx_zyx)),
        "number_of_shards": len(shard_rows),
    }
    if (folder / "manifest.json").exists():
        output_folders.require_same(folder / "manifest.json", plan)
        _remove_working_files(folder)
        _update_index(shards.open(folder), table)
        return shards.open(folder)
    output_folders.require_same(folder / "plan.json", plan)

    names = [
        f"crops-{i:05d}-of-{len(shard_rows):05d}.array_record"
        for i in range(len(shard_rows))
    ]
    ready = [_is_ready(folder / name) for name in names]
    done = sum(
        len(r) for r, is_ready in zip(shard_rows, ready, strict=True) if is_ready
    )
    progress = Progress("crops", len(rows), "crops", done=done)
    ids = table["synapse_id"].to_numpy()
    for name, of_shard, is_ready in zip(names, shard_rows, ready, strict=True):
        if is_ready:
            continue
        context_starts = starts[of_shard] - np.asarray(margin_vx_zyx)
        read = crops.read(volume, context_starts, record_shape)
        whole = _write_shard(folder / name, ids[of_shard], read, progress)
        cut = pa.table({"row": of_shard, "whole": whole})
        # The rows are written before the shard, so that every shard has its rows.
        files.write_feather(_rows_path(folder / name), cut)
        (folder / f"{name}.partial").rename(folder / name)
    return _finish(folder, plan, names, table, status, has_class)


def _is_ready(path: pathlib.Path) -> bool:
    """Returns whether a shard exists and has a record for each of its rows.

    A shard without some records, because of missing chunks, is cut again: the volume
    may have been unreachable for a while.
    """
    if not path.exists() or not _rows_path(path).exists():
        return False
    try:
        records = ArrayRecordReader(str(path)).num_records()
    except RuntimeError:  # the file is cut short
        return False
    return records == len(feather.read_table(_rows_path(path)))


def _write_shard(
    path: pathlib.Path, ids: np.ndarray, read: Iterable[crops.Crop], progress: Progress
) -> np.ndarray:
    """Writes `path`.partial, and returns which crops are complete, bool [n].

    A crop with missing chunks gets no record.
    """
    partial = path.with_name(path.name + ".partial")
    writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    whole = np.zeros(len(ids), bool)
    for i, crop in enumerate(read):
        whole[i] = not crop.unreadable
        if whole[i]:
            writer.write(shards.encode(int(ids[i]), crop.voxels))
        progress.add()
    writer.close()
    # The writer reports neither an unwritable path nor a full disk.
    try:
        written = ArrayRecordReader(str(partial)).num_records()
    except RuntimeError as error:
        raise UserError(f"could not write {path} (disk full?): {error}") from None
    if written != whole.sum():
        raise UserError(
            f"{path} took {written} of {whole.sum()} records; is the disk full?"
        )
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    return whole


def _finish(
    folder: pathlib.Path,
    plan: dict[str, Any],
    names: list[str],
    table: pa.Table,
    status: np.ndarray,
    has_class: np.ndarray,
) -> Shards:
    status = status.copy()
    reasons = np.where(has_class, status, MISSING_CLASS)
    entries, rows, shard, position = [], [], [], []
    for number, name in enumerate(names):
        cut = feather.read_table(_rows_path(folder / name))
        whole = cut["whole"].to_numpy()
        reasons[cut["row"].to_numpy()[~whole]] = crops.MISSING_DATA
        rows.append(cut["row"].to_numpy()[whole])
        shard.append(np.full(whole.sum(), number, np.int32))
        position.append(np.arange(whole.sum(), dtype=np.int32))
        path = folder / name
        entry = {"name": name, "records": int(whole.sum())}
        entry |= {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        entries.append(entry)
    kept = np.concatenate(rows)
    if not len(kept):
        raise UserError(
            f"none of {has_class.sum():,} crops could be read: every one has missing "
            f"chunks; is {plan['volume']} complete and mounted?"
        )
    columns = {"shard": np.concatenate(shard), "position": np.concatenate(position)}
    columns["status"] = pa.array(status[kept], pa.string())
    index = _with_synapses(pa.table(columns), table, kept)
    is_dropped = np.ones(len(table), bool)
    is_dropped[kept] = False
    dropped = pa.table(
        {
            "synapse_id": table["synapse_id"].filter(pa.array(is_dropped)),
            "reason": pa.array(reasons[is_dropped], pa.string()),
        }
    )
    reason_counts = collections.Counter(reasons[is_dropped].tolist())
    manifest = plan | {
        "records": len(index),
        "dropped": dict(sorted(reason_counts.items())),
        "shards": entries,
        "written_by": f"synister_jax {synister_jax.__version__}",
    }
    files.write_feather(folder / "dropped.feather", dropped)
    files.write_feather(folder / "index.feather", index)
    files.write_json(folder / "manifest.json", manifest)
    _remove_working_files(folder)
    return shards.open(folder)


def _rows_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".rows.feather")


def _remove_working_files(folder: pathlib.Path) -> None:
    for pattern in ("plan.json", "*.rows.feather", "*.partial"):
        for path in folder.glob(pattern):
            path.unlink()


def _with_synapses(records: pa.Table, table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Returns the index: a row for each record, with the columns of its synapse."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        records = records.append_column(name, column.take(pa.array(rows)))
    return records.replace_schema_metadata(None)


def _update_index(there: Shards, table: pa.Table) -> None:
    """Gives finished shards new columns of the table, for example a new split."""
    ids = table["synapse_id"].combine_chunks()
    rows = pc.index_in(there.index["synapse_id"], value_set=ids)
    records = there.index.select(["shard", "position", "status"])
    index = _with_synapses(records, table, rows.to_numpy())
    if not index.equals(there.index):
        files.write_feather(there.folder / "index.feather", index)
