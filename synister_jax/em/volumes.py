# SPDX-License-Identifier: Apache-2.0
"""Opens, reads and writes EM volumes with TensorStore, with the axes (z, y, x).

Only `open` and `write_n5` know that containers have other orders of axes.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from synister_jax.base import files
from synister_jax.base.errors import UserError, redact
from synister_jax.em import layouts

# The file by which a container is recognised, and TensorStore's driver for it.
_METADATA = {
    "attributes.json": "n5",
    "zarr.json": "zarr3",
    ".zarray": "zarr",
    "info": "neuroglancer_precomputed",
}

# A URI may begin with the format, as in precomputed://gs://…
_PREFIXES = {
    "n5": ("n5",),
    "zarr": ("zarr", "zarr3"),
    "zarr2": ("zarr",),
    "zarr3": ("zarr3",),
    "precomputed": ("neuroglancer_precomputed",),
}

# A request that fails for a temporary reason is sent again after 0.5, 1, 2, … s, for
# about 50 s in all. With TensorStore's own limits this takes a quarter of an hour.
RETRIES = {"max_retries": 7, "initial_delay": "500ms", "max_delay": "16s"}

# Without these limits, TensorStore waits for ever for a server that accepts a
# connection and sends nothing. They can only be set in the environment.
_PATIENCE_SECONDS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "15",
}

# The exceptions that TensorStore raises.
ERRORS = (ValueError, NotImplementedError, OSError)


@dataclasses.dataclass(frozen=True)
class Volume:
    """A uint8 volume whose voxel (0, 0, 0) is at the position `offset_nm_zyx`."""

    uri: str
    voxel_size_nm_zyx: tuple[float, ...]
    offset_nm_zyx: tuple[float, ...]
    store: ts.TensorStore  # domain [0, shape), axes z, y, x
    # The same array. Its reads ask the source whether cached chunks are still valid.
    fresh: ts.TensorStore
    metadata: tuple[ts.KvStore, str] | None  # the metadata file, if there is one

    @property
    def shape_zyx(self) -> tuple[int, ...]:
        """The shape in voxels."""
        return tuple(self.store.shape)

    @property
    def chunk_shape_zyx(self) -> tuple[int, ...]:
        """The shape of a chunk in voxels."""
        shape = self.store.chunk_layout.read_chunk.shape
        assert shape is not None  # every driver that reads chunks has it
        return tuple(int(size or 0) for size in shape)

    def read(
        self, start_vx_zyx: Sequence[int], stop_vx_zyx: Sequence[int]
    ) -> np.ndarray:
        """Reads the box [start, stop), uint8 (z, y, x).

        The box must be inside the volume. A chunk that cannot be read raises one of
        `ERRORS`.
        """
        return self.start_reading(start_vx_zyx, stop_vx_zyx).result()

    def start_reading(
        self,
        start_vx_zyx: Sequence[int],
        stop_vx_zyx: Sequence[int],
        fresh: bool = False,
    ) -> ts.Future:
        """Starts to read a box like `read`, and returns a future for the box.

        Args:
          fresh: ask the source whether the cached chunks are still valid.
        """
        store = self.fresh if fresh else self.store
        return store[box_of(start_vx_zyx, stop_vx_zyx)].read()

    def check_present(self) -> None:
        """Checks that the volume still exists, after a chunk could not be read.

        Raises:
          UserError: the metadata file of the volume cannot be read.
        """
        if self.metadata is None:
            return
        base, name = self.metadata
        try:
            there = base.read(name).result().state == "value"
            why = f"{name} cannot be found"
        except ERRORS as error:
            there, why = False, reason(error)
        if not there:
            raise UserError(
                f"volume {self.uri} is no longer there: {why}; results that are "
                "already written are kept, run again when the volume is back"
            )


def box_of(start: Sequence[int], stop: Sequence[int]) -> tuple[slice, ...]:
    """Returns the slices that select the box [start, stop) in an array."""
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


def reason(error: Exception) -> str:
    """Returns TensorStore's message without the spec and the web page quoted in it."""
    quoted = r" \[(tensorstore_spec|http_response_body)='.*?'\](?= \[|$)"
    return re.sub(quoted, "", str(error), flags=re.DOTALL)


def open(
    uri: str,
    voxel_size_nm_zyx: Sequence[float] | None = None,
    cache_bytes: int = 1 << 30,
) -> Volume:
    """Opens an N5, Zarr 2, Zarr 3 or precomputed volume.

    Args:
      uri: the address of the array itself. This is a local path, a TensorStore
        key-value URL (`file://`, `http://`, `https://`, `gs://`, `s3://`), or a
        TensorStore spec as JSON text. A path or a URL may begin with the format
        (`precomputed://gs://…`, `n5://`, `zarr://`).
      voxel_size_nm_zyx: the voxel size that the caller expects. It must equal the voxel
        size of the container, and is used if the container does not state its own.
      cache_bytes: the memory for decoded chunks.

    Raises:
      UserError: the volume does not exist or cannot be reached. Or TensorStore does not
        know its compression. Or it is not a three-dimensional uint8 array. Or its voxel
        size is unknown or not the expected one.
    """
    context = _context(cache_bytes)
    spec, metadata, metadata_file = _find(uri, context)
    driver = spec["driver"]
    fresh_spec = spec
    if driver in _METADATA.values():
        # Without this option, TensorStore reads a missing chunk as zeros. It must be an
        # error instead.
        spec = spec | {"fill_missing_data_reads": False, "recheck_cached_data": "open"}
        fresh_spec = spec | {"recheck_cached_data": True}
    store, axes, offset_vx_zyx = _as_zyx(_open_store(spec, context, uri), driver, uri)
    fresh, _, _ = _as_zyx(_open_store(fresh_spec, context, uri), driver, uri)
    if store.dtype != ts.uint8:
        raise UserError(
            f"volume {uri} holds {store.dtype.name}; only uint8 is supported"
        )
    stated: tuple[float, ...] | None
    offset_nm: tuple[float, ...] = (0.0, 0.0, 0.0)
    if driver == "neuroglancer_precomputed":
        stated = tuple(unit.multiplier for unit in store.dimension_units if unit)
    else:
        stated, offset_nm = layouts.physical_nm(driver, metadata, axes, uri)
    voxel_size = _agreed_voxel_size(stated, voxel_size_nm_zyx, uri)
    offset = tuple(
        o + v * s for o, v, s in zip(offset_nm, offset_vx_zyx, voxel_size, strict=True)
    )
    return Volume(redact(uri), voxel_size, offset, store, fresh, metadata_file)


def storage_seconds() -> float:
    """Returns the total time of this process's reads from files and buckets, in s.

    TensorStore measures this time. It does not measure reads over http.
    """
    total = 0.0
    for metric in ts.experimental_collect_matching_metrics("/tensorstore/kvstore/"):
        if metric["name"].endswith("/read_latency_ms"):
            total += sum(v["count"] * v["mean"] for v in metric["values"]) / 1000
    return total


def write_n5(
    path: str | pathlib.Path,
    array_zyx: np.ndarray,
    voxel_size_nm_zyx: Sequence[float],
    offset_nm_zyx: Sequence[float] = (0, 0, 0),
    chunk_shape_zyx: Sequence[int] = (16, 128, 128),
) -> None:
    """Writes an array as an N5 data set, whose axes on disk are (x, y, z).

    Args:
      path: the folder of the data set. An existing data set is replaced.
      array_zyx: uint8.
      voxel_size_nm_zyx: the voxel size in nm.
      offset_nm_zyx: the position of voxel (0, 0, 0) in nm.
      chunk_shape_zyx: the shape of a chunk in voxels.
    """
    path = pathlib.Path(path)
    store = ts.open(
        {
            "driver": "n5",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "metadata": {
                "dimensions": list(array_zyx.shape[::-1]),
                "blockSize": list(chunk_shape_zyx[::-1]),
                "dataType": "uint8",
                "compression": {"type": "gzip", "level": 1},
                "axes": ["x", "y", "z"],
                "units": ["nm"] * 3,
                "resolution": [float(v) for v in voxel_size_nm_zyx[::-1]],
            },
        },
        create=True,
        delete_existing=True,
    ).result()
    store.T.write(array_zyx).result()
    attributes_path = path / "attributes.json"
    attributes = files.read_json(attributes_path)
    # TensorStore does not write these two. N5 readers need the version, and daisy reads
    # the offset.
    attributes["n5"] = "2.0.0"
    attributes["offset"] = [float(v) for v in offset_nm_zyx[::-1]]
    files.write_json(attributes_path, attributes)


def create_zarr(path: str | pathlib.Path, metadata: dict[str, Any]) -> ts.TensorStore:
    """Creates a Zarr 2 array in the folder `path`, and returns it for writing.

    Args:
      path: the folder.
      metadata: the metadata of the array, as TensorStore's driver `zarr` takes it.

    Raises:
      UserError: the array cannot be created.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": metadata,
    }
    context = ts.Context({"file_io_sync": False})
    return written(path, ts.open(spec, context=context, create=True))


def written(path: str | pathlib.Path, future: ts.Future | ts.WriteFutures) -> Any:
    """Waits until TensorStore has written to `path`, and returns the result.

    Raises:
      UserError: TensorStore raises ValueError or NotImplementedError. An OSError is
        passed on.
    """
    try:
        return future.result()
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"cannot write {path}: {error}; fix that and run again"
        ) from None


def _context(cache_bytes: int) -> ts.Context:
    for name, seconds in _PATIENCE_SECONDS.items():
        os.environ.setdefault(name, seconds)
    retries = {f"{store}_request_retries": RETRIES for store in ("http", "gcs", "s3")}
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}} | retries)


def _open_store(spec: dict[str, Any], context: ts.Context, uri: str) -> ts.TensorStore:
    try:
        return ts.open(spec, context=context, open=True, read=True).result()
    except ERRORS as error:
        codec = re.search(r'"([\w.]+)" is not registered', str(error))
        if codec:
            raise UserError(
                f"volume {uri} is compressed with {codec[1]}, which TensorStore cannot "
                "read; make a copy that is compressed with gzip, zstd or blosc"
            ) from None
        raise UserError(f"cannot open volume {uri}: {reason(error)}") from None


def _find(
    uri: str, context: ts.Context
) -> tuple[dict[str, Any], dict[str, Any], tuple[ts.KvStore, str] | None]:
    """Returns the TensorStore spec of `uri`, the metadata and the metadata file."""
    if uri.lstrip().startswith("{"):
        return _find_of_spec(uri, context)
    prefix, separator, rest = uri.partition("://")
    drivers = _PREFIXES.get(prefix, ()) if separator else ()
    place = rest if drivers else uri
    url = place if "://" in place else pathlib.Path(place).resolve().as_uri()
    base = _open_kvstore(url, context, uri)
    # If the folder has two metadata files, the file of the prefix is used.
    by_prefix = sorted(_METADATA.items(), key=lambda item: item[1] not in drivers)
    for name, driver in by_prefix:
        metadata = _read_metadata(base, name, uri)
        if not metadata:
            continue
        if drivers and driver not in drivers:
            raise UserError(
                f"{uri} is not a {prefix} volume: its file {name} says that it is "
                f"{driver}; leave {prefix}:// out"
            )
        is_group = (driver == "n5" and "dimensions" not in metadata) or (
            driver == "zarr3" and metadata.get("node_type") == "group"
        )
        if is_group:
            raise UserError(
                f"{uri} is a {driver} container, not an array; add the path of the "
                "array in the container, for example volumes/raw/s0"
            )
        spec = {"driver": driver, "kvstore": base.spec().to_json()}
        return spec, metadata, (base, name)
    raise UserError(
        f"no volume at {uri}: none of {', '.join(_METADATA)} (N5, Zarr 3, Zarr 2, "
        "precomputed) is there, or you have no permission to read them; check the "
        "address and your permissions"
    )


def _find_of_spec(
    text: str, context: ts.Context
) -> tuple[dict[str, Any], dict[str, Any], tuple[ts.KvStore, str] | None]:
    try:
        spec = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            "a volume that begins with a brace is a TensorStore spec, but this one is "
            f"not valid JSON: {error}"
        ) from None
    if "driver" not in spec:
        raise UserError(
            'the TensorStore spec of the volume has no "driver"; add it, for example '
            '"driver": "zarr"'
        )
    names = [name for name, driver in _METADATA.items() if driver == spec["driver"]]
    if not names:
        return spec, {}, None
    base = _open_kvstore(spec.get("kvstore"), context, text)
    metadata = _read_metadata(base, names[0], text)
    if not metadata:
        raise UserError(
            f"no volume at {text}: {names[0]} cannot be read there; check the kvstore"
        )
    return spec, metadata, (base, names[0])


def _open_kvstore(kvstore: Any, context: ts.Context, uri: str) -> ts.KvStore:
    # TensorStore accepts the path of an array with or without a slash at its end. The
    # metadata files are only found below a path with a slash.
    if isinstance(kvstore, str):
        kvstore = kvstore.rstrip("/") + "/"
    elif isinstance(kvstore, dict) and kvstore.get("path"):
        kvstore = kvstore | {"path": kvstore["path"].rstrip("/") + "/"}
    try:
        return ts.KvStore.open(kvstore, context=context).result()
    except ERRORS as error:
        raise UserError(f"cannot open volume {uri}: {reason(error)}") from None


def _read_metadata(base: ts.KvStore, name: str, uri: str) -> dict[str, Any]:
    """Returns the container's metadata. For Zarr, `parent` is that of the group."""
    metadata = _read_json(base, name, uri)
    if name == ".zarray" and metadata:
        metadata["attributes"] = _read_json(base, ".zattrs", uri)
    if name in (".zarray", "zarr.json") and metadata:
        folder, _, own_name = base.path.rstrip("/").rpartition("/")
        above = base.copy()
        above.path = f"{folder}/"
        group = ".zattrs" if name == ".zarray" else "zarr.json"
        parent = _read_json(above, group, uri)
        metadata["parent"] = (
            parent if name == ".zarray" else parent.get("attributes", {})
        )
        metadata["name"] = own_name
    return metadata


def _read_json(base: ts.KvStore, name: str, uri: str) -> dict[str, Any]:
    """Returns the content of a JSON file, or {} if it is absent or may not be read."""
    try:
        read = base.read(name).result()
        found = json.loads(read.value) if read.state == "value" else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{name} of volume {uri} is not valid JSON: {error}") from None
    except ERRORS as error:
        # A public bucket that does not let users list its files gives this error for
        # every file that does not exist.
        if str(error).startswith("PERMISSION_DENIED"):
            return {}
        raise UserError(
            f"cannot read {name} of volume {uri}: {reason(error)}; check the address "
            "and the connection"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{name} of volume {uri} is not a JSON object")
    return found


def _as_zyx(
    store: ts.TensorStore, driver: str, uri: str
) -> tuple[ts.TensorStore, list[int], tuple[int, ...]]:
    """Returns the store as (z, y, x) from 0, and what it was on disk.

    The second value has the places of z, y and x among the axes on disk. The third is
    the origin of the domain on disk, in voxels (z, y, x).
    """
    if driver == "neuroglancer_precomputed":
        if store.shape[-1] != 1:
            raise UserError(
                f"volume {uri} has several channels; give a volume with one"
            )
        store = store[ts.d["channel"][0]]
    if store.rank != 3:
        raise UserError(
            f"volume {uri} has {store.rank} dimensions {tuple(store.shape)}; "
            "three (z, y, x) are needed"
        )
    # If the container does not name its axes, the order is the usual one of its format.
    named = list(store.domain.labels)
    if sorted(named) != ["x", "y", "z"]:
        named = ["x", "y", "z"] if driver == "n5" else ["z", "y", "x"]
    axes = [named.index(name) for name in "zyx"]
    store = store[ts.d[axes].transpose[:]]
    origin = tuple(store.domain.origin)
    return store[ts.d[:].translate_to[0]], axes, origin


def _agreed_voxel_size(
    stated: tuple[float, ...] | None, expected: Sequence[float] | None, uri: str
) -> tuple[float, ...]:
    if stated is None:
        if expected is None:
            raise UserError(
                f"volume {uri} does not state its voxel size; give voxel_size_nm_zyx"
            )
        return tuple(float(v) for v in expected)
    if expected is not None and not np.allclose(stated, expected, rtol=1e-6):
        raise UserError(
            f"volume {uri} has voxels of {_text(stated)} nm (z, y, x) but "
            f"{_text(expected)} nm are expected; use the matching volume or config"
        )
    return stated


def _text(size: Sequence[float]) -> str:
    return "×".join(f"{v:g}" for v in size)
