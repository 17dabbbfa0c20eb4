# SPDX-License-Identifier: Apache-2.0
"""Training crops in ArrayRecord shards, their index and their manifest.

A folder of shards holds `crops-00017-of-00064.array_record` (a record is the synapse
id and the raw crop), `index.feather` (a row a record, in record order: shard,
position, status and the synapse's columns) and `manifest.json`, written last: a
folder without it is unfinished.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from pyarrow import feather

import synister_jax
from synister_jax import files, synapses, volumes
from synister_jax.command import Progress, UserError

FORMAT = "synister_jax crops, version 1"
MISSING_CLASS = "no_class"
# The columns that decide the crops; all others can change without cutting again.
_DECIDE_CROPS = ("synapse_id", *synapses.POSITION, "neurotransmitter")
_ID = struct.Struct("<q")
# group_size 1: Grain reads records one by one. EM is noise to a compressor: zstd:1
# halves it about as well as slower levels do.
_WRITER_OPTIONS = "group_size:1,zstd:1"


@dataclasses.dataclass(frozen=True)
class Shards:
    """A finished folder of shards; row i of `index` describes record i."""

    folder: pathlib.Path
    manifest: dict[str, Any]
    index: pa.Table

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def record_shape_zyx(self) -> tuple[int, ...]:
        """The crop with its context margin."""
        return record_shape_zyx(
            self.manifest["crop_shape_zyx"], self.manifest["margin_vx_zyx"]
        )

    def source(self) -> grain.sources.ArrayRecordDataSource:
        """Random access to the records; decode them with `decode`."""
        names = [str(self.folder / shard["name"]) for shard in self.manifest["shards"]]
        return grain.sources.ArrayRecordDataSource(names)

    def sha256(self, split: str) -> str:
        """Of crops, labels and parts of a split: equal for equal training data."""
        digest = hashlib.sha256()
        for shard in self.manifest["shards"]:
            digest.update(shard["sha256"].encode())
        names = ["synapse_id", "neuron_id", "neurotransmitter", f"split_{split}"]
        digest.update(files.sha256_of_columns(self.index, names).encode())
        return digest.hexdigest()

    def decode(self, record: bytes) -> tuple[int, np.ndarray]:
        """(synapse id, uint8 crop of `record_shape_zyx`)."""
        return decode(record, self.record_shape_zyx)


def record_shape_zyx(
    crop_shape_zyx: Sequence[int], margin_vx_zyx: Sequence[int]
) -> tuple[int, ...]:
    """The margin lies on both sides of the crop."""
    return tuple(c + 2 * m for c, m in zip(crop_shape_zyx, margin_vx_zyx, strict=True))


def encode(synapse_id: int, crop: np.ndarray) -> bytes:
    """A record: the id as little-endian int64, then the uint8 crop in C order."""
    return _ID.pack(synapse_id) + crop.tobytes()


def decode(record: bytes, shape_zyx: Sequence[int]) -> tuple[int, np.ndarray]:
    """Inverse of `encode`; `UserError` when the length is not that of the shape."""
    expected = _ID.size + math.prod(shape_zyx)
    if len(record) != expected:
        raise UserError(
            f"a record has {len(record)} bytes, {tuple(shape_zyx)} needs {expected}; "
            "the shards are damaged: cut them again"
        )
    crop = np.frombuffer(record, np.uint8, offset=_ID.size).reshape(shape_zyx)
    return _ID.unpack_from(record)[0], crop


def write(
    folder: str | pathlib.Path,
    table: pa.Table,
    volume: volumes.Volume,
    *,
    crop_shape_zyx: Sequence[int],
    margin_vx_zyx: Sequence[int],
    classes: Sequence[str],
    shard_bytes: int = 128 << 20,
) -> Shards:
    """Cuts the crop of every synapse with a class in `classes` into shards.

    Each shard covers neighbouring chunks and is a pure function of the arguments:
    it appears by renaming, a rerun keeps it, and the finished folder does not depend
    on how often the work was interrupted. Rows without a class, with a crop wholly
    outside the volume or with missing chunks are counted in the manifest and listed
    with their reason in `dropped.feather`.

    Raises:
      UserError: no labelled row, or the folder holds shards of other arguments.
    """
    folder = files.make_folder(folder)
    record_shape = record_shape_zyx(crop_shape_zyx, margin_vx_zyx)
    starts = volumes.crop_starts_vx_zyx(
        synapses.positions_nm_zyx(table), crop_shape_zyx, volume
    )
    status = volumes.border_status(starts, crop_shape_zyx, volume)
    has_class = synapses.labels(table, classes) >= 0
    rows = np.flatnonzero(has_class & (status != volumes.OUTSIDE))
    if not len(rows):
        raise UserError(
            f"no row can be cut: of {len(table):,} synapses {has_class.sum():,} have "
            f"one of the classes {', '.join(classes)}, and none of these lies in the "
            "volume; a table with known neurotransmitters in the volume's frame is "
            "needed"
        )
    rows = rows[volumes.chunk_order(starts[rows], crop_shape_zyx, volume)]
    per_shard = max(1, shard_bytes // math.prod(record_shape))
    shard_rows = np.array_split(rows, math.ceil(len(rows) / per_shard))
    plan = {
        "format": FORMAT,
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
        files.keep_plan(folder / "manifest.json", plan)
        _remove_working_files(folder)
        _update_index(open(folder), table)
        return open(folder)
    files.keep_plan(folder / "plan.json", plan)

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
        crops = volumes.read_crops(volume, context_starts, record_shape)
        whole = _write_shard(folder / name, ids[of_shard], crops, progress)
        cut = pa.table({"row": of_shard, "whole": whole})
        # Before the shard itself: where a shard is, its rows are too.
        files.write_feather(_rows_path(folder / name), cut)
        (folder / f"{name}.partial").rename(folder / name)
    return _finish(folder, plan, names, table, status, has_class)


def _is_ready(path: pathlib.Path) -> bool:
    """Whether a shard is there with a record for each of its rows.

    One that lacks some, for missing chunks, is cut again: a volume may have been
    unreachable for a while.
    """
    if not path.exists() or not _rows_path(path).exists():
        return False
    try:
        records = ArrayRecordReader(str(path)).num_records()
    except RuntimeError:  # cut short
        return False
    return records == len(feather.read_table(_rows_path(path)))


def open(folder: str | pathlib.Path) -> Shards:  # noqa: A001 - shards.open reads well
    """Opens a finished folder, or raises `UserError` naming what is missing."""
    folder = pathlib.Path(folder)
    manifest_path = folder / "manifest.json"
    if not manifest_path.exists():
        state = "unfinished" if (folder / "plan.json").exists() else "not there"
        raise UserError(
            f"shards {folder} are {state} (no manifest.json); run "
            "tools/shard_crops.py with this --output, it goes on where it stopped"
        )
    manifest = files.read_json(manifest_path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{manifest_path} is not a manifest of {FORMAT!r}")
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            found = "missing" if size is None else f"{size:,} bytes long"
            raise UserError(
                f"shard {path} is {found}, the manifest says {shard['bytes']:,} bytes;"
                " restore the file, or delete manifest.json and run"
                " tools/shard_crops.py again (it cuts all crops anew)"
            )
    try:
        index = feather.read_table(folder / "index.feather")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {folder}/index.feather: {error}") from None
    if len(index) != manifest["records"]:
        raise UserError(
            f"{folder}/index.feather has {len(index):,} rows, the manifest says "
            f"{manifest['records']:,} records; cut the shards again"
        )
    return Shards(folder, manifest, index)


def verify(shards: Shards) -> None:
    """Reads every record back; raises `UserError` at the first that is wrong."""
    ids = shards.index["synapse_id"].to_numpy()
    shard = shards.index["shard"].to_numpy()
    position = shards.index["position"].to_numpy()
    progress = Progress("verified", len(ids), "records")
    first = 0
    for number, entry in enumerate(shards.manifest["shards"]):
        path = shards.folder / entry["name"]
        if files.sha256(path) != entry["sha256"]:
            raise UserError(f"shard {path} does not have the checksum of the manifest")
        reader = ArrayRecordReader(str(path))
        if reader.num_records() != entry["records"]:
            raise UserError(
                f"shard {path} holds {reader.num_records()} records, the manifest "
                f"says {entry['records']}"
            )
        for offset, record in enumerate(reader.read_all() if entry["records"] else []):
            row = first + offset
            synapse_id, _ = shards.decode(record)
            found, wanted = (number, offset), (shard[row], position[row])
            if synapse_id != ids[row] or found != wanted:
                raise UserError(
                    f"record {offset} of {path} is synapse {synapse_id}; row {row} of "
                    f"index.feather says synapse {ids[row]} at {wanted}"
                )
            progress.add()
        reader.close()
        first += entry["records"]


def require(
    shards: Shards,
    *,
    crop_shape_zyx: Sequence[int],
    margin_vx_zyx: Sequence[int],
    voxel_size_nm_zyx: Sequence[float],
    classes: Sequence[str],
) -> None:
    """Raises `UserError` when the shards do not fit what a config says.

    A larger margin than needed is fine: the crop is taken from the middle.
    """
    manifest = shards.manifest
    differences = []
    if tuple(manifest["crop_shape_zyx"]) != tuple(crop_shape_zyx):
        differences.append(
            f"crop_shape_zyx {manifest['crop_shape_zyx']} ≠ {list(crop_shape_zyx)}"
        )
    if any(
        m < n for m, n in zip(manifest["margin_vx_zyx"], margin_vx_zyx, strict=True)
    ):
        differences.append(
            f"margin_vx_zyx {manifest['margin_vx_zyx']} < {list(margin_vx_zyx)}"
        )
    if not np.allclose(manifest["voxel_size_nm_zyx"], voxel_size_nm_zyx, rtol=1e-6):
        differences.append(
            f"voxel_size_nm_zyx {manifest['voxel_size_nm_zyx']} ≠ "
            f"{list(voxel_size_nm_zyx)}"
        )
    if shards.classes != tuple(classes):
        differences.append(f"classes {list(shards.classes)} ≠ {list(classes)}")
    if differences:
        raise UserError(
            f"shards {shards.folder} do not fit the config (shards ≠ config): "
            f"{'; '.join(differences)}; cut shards with this config"
        )


def _write_shard(
    path: pathlib.Path, ids: np.ndarray, crops: Any, progress: Progress
) -> np.ndarray:
    """Writes `path`.partial from (crop, whole) pairs; returns `whole`, [n] bool.

    A crop with missing chunks gets no record.
    """
    partial = path.with_name(path.name + ".partial")
    writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    whole = np.zeros(len(ids), bool)
    for i, (crop, is_whole) in enumerate(crops):
        whole[i] = is_whole
        if is_whole:
            writer.write(encode(int(ids[i]), crop))
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
        reasons[cut["row"].to_numpy()[~whole]] = volumes.MISSING_DATA
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
    reason_counts = dict(
        zip(
            *np.unique(reasons[is_dropped].astype(str), return_counts=True), strict=True
        )
    )
    manifest = plan | {
        "records": len(index),
        "dropped": {str(k): int(v) for k, v in reason_counts.items()},
        "shards": entries,
        "written_by": f"synister_jax {synister_jax.__version__}",
    }
    files.write_feather(folder / "dropped.feather", dropped)
    files.write_feather(folder / "index.feather", index)
    files.write_json(folder / "manifest.json", manifest)
    _remove_working_files(folder)
    return open(folder)


def _rows_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".rows.feather")


def _remove_working_files(folder: pathlib.Path) -> None:
    for pattern in ("plan.json", "*.rows.feather", "*.partial"):
        for path in folder.glob(pattern):
            path.unlink()


def _with_synapses(records: pa.Table, table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The index: a row a record, with the columns of its row of the synapse table."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        records = records.append_column(name, column.take(pa.array(rows)))
    return records.replace_schema_metadata(None)


def _update_index(shards: Shards, table: pa.Table) -> None:
    """Gives finished shards the columns, such as new splits, of an equal table."""
    ids = table["synapse_id"].combine_chunks()
    rows = pc.index_in(shards.index["synapse_id"], value_set=ids)
    records = shards.index.select(["shard", "position", "status"])
    index = _with_synapses(records, table, rows.to_numpy())
    if not index.equals(shards.index):
        files.write_feather(shards.folder / "index.feather", index)
