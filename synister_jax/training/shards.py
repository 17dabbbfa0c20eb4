# SPDX-License-Identifier: Apache-2.0
"""Training crops in ArrayRecord shards, their index and their manifest.

A folder of shards holds

- `crops-00017-of-00064.array_record` and so on. A record is the synapse id and the raw
  crop.
- `index.feather`, one row for each record in their order: the shard, the position in
  it, the status, and the columns of the synapse.
- `manifest.json`, which is written last. A folder without it is not finished.
"""

import dataclasses
import hashlib
import math
import pathlib
import struct
from collections.abc import Sequence
from typing import NotRequired, TypedDict, cast

import grain
import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordReader
from pyarrow import feather

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress

FORMAT = "synister_jax crops, version 1"
_ID = struct.Struct("<q")


class ShardEntry(TypedDict):
    """A shard in the manifest."""

    name: str
    records: int
    bytes: int
    sha256: str


class Manifest(TypedDict):
    """What manifest.json says about a finished folder."""

    format: str
    neither_crops: NotRequired[int]  # only if there are pseudo-classes
    unknown_per_class: NotRequired[int]
    volume: str
    volume_shape_zyx: list[int]
    voxel_size_nm_zyx: list[float]
    offset_nm_zyx: list[float]
    synapses_sha256: str  # the columns that decide which crops are cut
    classes: list[str]
    crop_shape_zyx: list[int]
    margin_vx_zyx: list[int]
    number_of_shards: int
    records: int
    dropped: dict[str, int]  # rows without a record, by reason
    shards: list[ShardEntry]
    written_by: str


@dataclasses.dataclass(frozen=True)
class Shards:
    """A finished folder of shards. Row i of `index` describes record i."""

    folder: pathlib.Path
    manifest: Manifest
    index: pa.Table

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def record_shape_zyx(self) -> tuple[int, ...]:
        """The shape of a crop with its margin of context."""
        return record_shape_zyx(
            self.manifest["crop_shape_zyx"], self.manifest["margin_vx_zyx"]
        )

    def source(self) -> grain.sources.ArrayRecordDataSource:
        """Returns random access to the records. Decode a record with `decode`."""
        names = [str(self.folder / shard["name"]) for shard in self.manifest["shards"]]
        return grain.sources.ArrayRecordDataSource(names)

    def sha256(self, split: str) -> str:
        """Returns a checksum of the crops, the labels and the parts of a split.

        Equal training data has equal checksums.
        """
        digest = hashlib.sha256()
        for shard in self.manifest["shards"]:
            digest.update(shard["sha256"].encode())
        names = ["synapse_id", "neuron_id", "neurotransmitter", f"split_{split}"]
        digest.update(files.sha256_of_columns(self.index, names).encode())
        return digest.hexdigest()

    def decode(self, record: bytes) -> tuple[int, np.ndarray]:
        """Returns the synapse id and the crop, uint8 [*record_shape_zyx]."""
        return decode(record, self.record_shape_zyx)


def record_shape_zyx(
    crop_shape_zyx: Sequence[int], margin_vx_zyx: Sequence[int]
) -> tuple[int, ...]:
    """Returns the shape of a crop with a margin on both sides of every axis."""
    return tuple(c + 2 * m for c, m in zip(crop_shape_zyx, margin_vx_zyx, strict=True))


def encode(synapse_id: int, crop: np.ndarray) -> bytes:
    """Returns a record: the id as little-endian int64, then the crop in C order."""
    return _ID.pack(synapse_id) + crop.tobytes()


def decode(record: bytes, shape_zyx: Sequence[int]) -> tuple[int, np.ndarray]:
    """Returns what `encode` was given: the id, and the crop uint8 [*shape_zyx].

    Raises:
      UserError: the record has another length than the shape needs.
    """
    expected = _ID.size + math.prod(shape_zyx)
    if len(record) != expected:
        raise UserError(
            f"a record has {len(record)} bytes, but a crop of shape "
            f"{tuple(shape_zyx)} needs {expected}; the shards are damaged: cut them "
            "again"
        )
    crop = np.frombuffer(record, np.uint8, offset=_ID.size).reshape(shape_zyx)
    return _ID.unpack_from(record)[0], crop


def open(folder: str | pathlib.Path) -> Shards:
    """Opens a finished folder.

    Raises:
      UserError: a file of the folder is missing or has another size.
    """
    folder = pathlib.Path(folder)
    manifest_path = folder / "manifest.json"
    if not manifest_path.exists():
        state = "unfinished" if (folder / "plan.json").exists() else "not there"
        raise UserError(
            f"shards {folder} are {state} (no manifest.json); run "
            "tools/shard_crops.py with this --output: it continues where it stopped"
        )
    manifest = files.read_json(manifest_path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{manifest_path} is not a manifest of {FORMAT!r}; give a folder that "
            "tools/shard_crops.py wrote"
        )
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            found = "missing" if size is None else f"{size:,} bytes long"
            raise UserError(
                f"shard {path} is {found}, but the manifest says {shard['bytes']:,} "
                "bytes; restore the file, or delete manifest.json and run "
                "tools/shard_crops.py, which then cuts all crops again"
            )
    try:
        index = feather.read_table(folder / "index.feather")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {folder}/index.feather: {error}") from None
    if len(index) != manifest["records"]:
        raise UserError(
            f"{folder}/index.feather has {len(index):,} rows, but the manifest says "
            f"{manifest['records']:,} records; cut the shards again"
        )
    return Shards(folder, cast(Manifest, manifest), index)


def verify(shards: Shards) -> None:
    """Reads every record back and checks it.

    Raises:
      UserError: a record is wrong; the message names the first one.
    """
    ids = shards.index["synapse_id"].to_numpy()
    shard = shards.index["shard"].to_numpy()
    position = shards.index["position"].to_numpy()
    progress = Progress("verified", len(ids), "records")
    first = 0
    for number, entry in enumerate(shards.manifest["shards"]):
        path = shards.folder / entry["name"]
        if files.sha256(path) != entry["sha256"]:
            raise UserError(
                f"shard {path} does not have the checksum of the manifest; restore the "
                "file, or cut the shards again"
            )
        reader = ArrayRecordReader(str(path))
        if reader.num_records() != entry["records"]:
            raise UserError(
                f"shard {path} holds {reader.num_records()} records, but the manifest "
                f"says {entry['records']}; restore the file, or cut the shards again"
            )
        for offset, record in enumerate(reader.read_all() if entry["records"] else []):
            row = first + offset
            synapse_id, _ = shards.decode(record)
            found, wanted = (number, offset), (shard[row], position[row])
            if synapse_id != ids[row] or found != wanted:
                raise UserError(
                    f"record {offset} of {path} is synapse {synapse_id}, but row {row} "
                    f"of index.feather says synapse {ids[row]} at (shard, position) "
                    f"{wanted}; cut the shards again"
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
    """Checks that the shards fit a config.

    The margin may be larger than needed, because the crop is taken from the middle.

    Raises:
      UserError: they do not fit; the message lists the differences.
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
