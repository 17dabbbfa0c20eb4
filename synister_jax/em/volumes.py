# SPDX-License-Identifier: Apache-2.0
"""EM volumes as (z, y, x) through TensorStore.

Everything that depends on how a container orders its axes happens in `open` and
`write_n5`; the rest of the project sees (z, y, x) only.
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

# Which file names a container by its presence, and TensorStore's driver for it.
_METADATA = {
    "attributes.json": "n5",
    "zarr.json": "zarr3",
    ".zarray": "zarr",
    "info": "neuroglancer_precomputed",
}

# The format may stand before a URI, as the field writes precomputed://gs://…
_PREFIXES = {
    "n5": ("n5",),
    "zarr": ("zarr", "zarr3"),
    "zarr2": ("zarr",),
    "zarr3": ("zarr3",),
    "precomputed": ("neuroglancer_precomputed",),
}

# A request that fails for a reason that may pass is sent again after 0.5, 1, 2, … s,
# some 50 s in all; TensorStore's own limits take a quarter of an hour.
RETRIES = {"max_retries": 7, "initial_delay": "500ms", "max_delay": "16s"}

# A server that takes the call and stays silent, too, is one that fails: TensorStore
# would wait for it for ever. It has these settings in the environment only.
_PATIENCE_SECONDS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "15",
}

# What TensorStore raises, whatever is wrong.
ERRORS = (ValueError, NotImplementedError, OSError)


@dataclasses.dataclass(frozen=True)
class Volume:
    """A uint8 volume whose index (0, 0, 0) lies at `offset_nm_zyx`."""

    uri: str
    voxel_size_nm_zyx: tuple[float, ...]
    offset_nm_zyx: tuple[float, ...]
    store: ts.TensorStore  # domain [0, shape), axes z, y, x
    # The same array; but it asks the source whether what is cached still holds.
    fresh: ts.TensorStore
    # The container's own file that says what is in it, where the format has one.
    metadata: tuple[ts.KvStore, str] | None

    @property
    def shape_zyx(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def chunk_shape_zyx(self) -> tuple[int, ...]:
        shape = self.store.chunk_layout.read_chunk.shape
        assert shape is not None  # of every driver that reads chunks
        return tuple(int(size or 0) for size in shape)

    def read(
        self, start_vx_zyx: Sequence[int], stop_vx_zyx: Sequence[int]
    ) -> np.ndarray:
        """The box [start, stop), which must lie inside; an unreadable chunk raises."""
        return self.start_reading(start_vx_zyx, stop_vx_zyx).result()

    def start_reading(
        self,
        start_vx_zyx: Sequence[int],
        stop_vx_zyx: Sequence[int],
        fresh: bool = False,
    ) -> ts.Future:
        """As `read`, without waiting: the future's result is the box."""
        store = self.fresh if fresh else self.store
        return store[box_of(start_vx_zyx, stop_vx_zyx)].read()

    def check_present(self) -> None:
        """Raises UserError where the volume itself is gone, not only a chunk of it."""
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
                f"volume {self.uri} is no longer there: {why}; what is written is "
                "kept, run again when it is back"
            )


def box_of(start: Sequence[int], stop: Sequence[int]) -> tuple[slice, ...]:
    """The index of [start, stop) in an array."""
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


def reason(error: Exception) -> str:
    """TensorStore's error without the spec and the web page that it quotes in full."""
    quoted = r" \[(tensorstore_spec|http_response_body)='.*?'\](?= \[|$)"
    return re.sub(quoted, "", str(error), flags=re.DOTALL)


def open(
    uri: str,
    voxel_size_nm_zyx: Sequence[float] | None = None,
    cache_bytes: int = 1 << 30,
) -> Volume:
    """Opens an N5, Zarr 2, Zarr 3 or precomputed volume.

    Args:
      uri: a local path, a TensorStore key-value URL (`file://`, `http://`,
        `https://`, `gs://`, `s3://`) of the array itself, either with or without its
        format before it (`precomputed://gs://…`, `n5://`, `zarr://`), or a TensorStore
        spec as JSON text.
      voxel_size_nm_zyx: what the caller believes; compared with the container, and
        used where the container does not say.
      cache_bytes: memory for decoded chunks.

    Raises:
      UserError: nothing there, out of reach, compressed in a way that TensorStore
        lacks, not three-dimensional uint8, unknown or different voxel size.
    """
    context = _context(cache_bytes)
    spec, metadata, metadata_file = _find(uri, context)
    driver = spec["driver"]
    fresh_spec = spec
    if driver in _METADATA.values():
        # A missing chunk must be an error here: TensorStore would read it as zeros.
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
    """Time that this process's reads of files and buckets took so far, added up.

    TensorStore measures them; reads over http it does not.
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
    """Writes a uint8 array (z, y, x) as an N5 data set (on disk x, y, z)."""
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
    # TensorStore writes neither: N5 readers want the version, daisy reads the offset.
    attributes["n5"] = "2.0.0"
    attributes["offset"] = [float(v) for v in offset_nm_zyx[::-1]]
    files.write_json(attributes_path, attributes)


def create_zarr(path: str | pathlib.Path, metadata: dict[str, Any]) -> ts.TensorStore:
    """A new Zarr 2 array in the folder `path`, to be written to.

    Raises:
      UserError: it cannot be created.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": metadata,
    }
    context = ts.Context({"file_io_sync": False})
    return written(path, ts.open(spec, context=context, create=True))


def written(path: str | pathlib.Path, future: ts.Future | ts.WriteFutures) -> Any:
    """Waits for what TensorStore writes to `path`; its errors become `UserError`."""
    try:
        return future.result()
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"cannot write {path}: {error}; mend that and rerun") from None


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
    """The TensorStore spec of `uri`, the container's own metadata, and their file."""
    if uri.lstrip().startswith("{"):
        return _find_of_spec(uri, context)
    prefix, separator, rest = uri.partition("://")
    drivers = _PREFIXES.get(prefix, ()) if separator else ()
    place = rest if drivers else uri
    url = place if "://" in place else pathlib.Path(place).resolve().as_uri()
    base = _open_kvstore(url, context, uri)
    # Where there are two, that of the prefix.
    by_prefix = sorted(_METADATA.items(), key=lambda item: item[1] not in drivers)
    for name, driver in by_prefix:
        metadata = _read_metadata(base, name, uri)
        if not metadata:
            continue
        if drivers and driver not in drivers:
            raise UserError(
                f"{uri} is no {prefix} volume: {name} there says that it is {driver}; "
                f"leave {prefix}:// out"
            )
        is_group = (driver == "n5" and "dimensions" not in metadata) or (
            driver == "zarr3" and metadata.get("node_type") == "group"
        )
        if is_group:
            raise UserError(
                f"{uri} is a {driver} container, not an array in it; name the data "
                "set too, for example volumes/raw/s0"
            )
        spec = {"driver": driver, "kvstore": base.spec().to_json()}
        return spec, metadata, (base, name)
    raise UserError(
        f"no volume at {uri}: none of {', '.join(_METADATA)} (N5, Zarr 3, Zarr 2, "
        "precomputed) is there, or you have no permission to read it"
    )


def _find_of_spec(
    text: str, context: ts.Context
) -> tuple[dict[str, Any], dict[str, Any], tuple[ts.KvStore, str] | None]:
    try:
        spec = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"volume spec is not valid JSON: {error}") from None
    if "driver" not in spec:
        raise UserError('volume spec has no "driver"')
    names = [name for name, driver in _METADATA.items() if driver == spec["driver"]]
    if not names:
        return spec, {}, None
    base = _open_kvstore(spec.get("kvstore"), context, text)
    metadata = _read_metadata(base, names[0], text)
    if not metadata:
        raise UserError(f"no volume at {text}: {names[0]} cannot be read there")
    return spec, metadata, (base, names[0])


def _open_kvstore(kvstore: Any, context: ts.Context, uri: str) -> ts.KvStore:
    # TensorStore takes an array's path with and without the slash at its end; names
    # of files below it need one.
    if isinstance(kvstore, str):
        kvstore = kvstore.rstrip("/") + "/"
    elif isinstance(kvstore, dict) and kvstore.get("path"):
        kvstore = kvstore | {"path": kvstore["path"].rstrip("/") + "/"}
    try:
        return ts.KvStore.open(kvstore, context=context).result()
    except ERRORS as error:
        raise UserError(f"cannot open volume {uri}: {reason(error)}") from None


def _read_metadata(base: ts.KvStore, name: str, uri: str) -> dict[str, Any]:
    """The container's metadata; for Zarr with `parent`, the attributes of its group."""
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
    """{} where there is no such file, or none that may be read."""
    try:
        read = base.read(name).result()
        found = json.loads(read.value) if read.state == "value" else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{name} of volume {uri} is not valid JSON: {error}") from None
    except ERRORS as error:
        # A public bucket that keeps its list of files to itself says this of every
        # file that is not there.
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
    """The store as (z, y, x) from 0, its axes' places before, its origin in voxels."""
    if driver == "neuroglancer_precomputed":
        if store.shape[-1] != 1:
            raise UserError(f"volume {uri} has several channels; one is needed")
        store = store[ts.d["channel"][0]]
    if store.rank != 3:
        raise UserError(
            f"volume {uri} has {store.rank} dimensions {tuple(store.shape)}; "
            "three (z, y, x) are needed"
        )
    # What the container names its axes, or else the custom of its format.
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
