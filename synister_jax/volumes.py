# SPDX-License-Identifier: Apache-2.0
"""EM volumes as (z, y, x) through TensorStore, and crops read from them chunk by chunk.

Everything that depends on how a container orders its axes happens in `open` and
`write_n5`; the rest of the project sees (z, y, x) only.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from synister_jax import container, files, spaces
from synister_jax.command import UserError

OK = "ok"
PARTLY_OUTSIDE = "partly_outside"
OUTSIDE = "outside"
MISSING_DATA = "missing_data"

# Which file names a container by its presence, and TensorStore's driver for it.
_METADATA = {
    "attributes.json": "n5",
    "zarr.json": "zarr3",
    ".zarray": "zarr",
    "info": "neuroglancer_precomputed",
}
# What TensorStore says of a chunk that is absent, cut short or not decodable; any
# other error (network, permission) may pass and stops the command instead.
_UNREADABLE = ("NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "INVALID_ARGUMENT")


@dataclasses.dataclass(frozen=True)
class Volume:
    """A uint8 volume whose index (0, 0, 0) lies at `offset_nm_zyx`."""

    uri: str
    voxel_size_nm_zyx: tuple[float, ...]
    offset_nm_zyx: tuple[float, ...]
    store: ts.TensorStore  # domain [0, shape), axes z, y, x

    @property
    def shape_zyx(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def chunk_shape_zyx(self) -> tuple[int, ...]:
        return tuple(self.store.chunk_layout.read_chunk.shape)

    def read(
        self, start_vx_zyx: Sequence[int], stop_vx_zyx: Sequence[int]
    ) -> np.ndarray:
        """The box [start, stop), which must lie inside; an unreadable chunk raises."""
        return self.store[_box(start_vx_zyx, stop_vx_zyx)].read().result()


def open(  # noqa: A001 - volumes.open reads well
    uri: str,
    voxel_size_nm_zyx: Sequence[float] | None = None,
    cache_bytes: int = 1 << 30,
) -> Volume:
    """Opens an N5, Zarr 2, Zarr 3 or precomputed volume.

    Args:
      uri: a local path, a TensorStore key-value URL (`file://`, `http://`, `gs://`,
        `s3://`) of the array itself, or a TensorStore spec as JSON text.
      voxel_size_nm_zyx: what the caller believes; compared with the container, and
        used where the container does not say.
      cache_bytes: memory for decoded chunks.

    Raises:
      UserError: nothing there, not three-dimensional uint8, unknown or different
        voxel size.
    """
    spec, metadata = _find(uri)
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    if spec["driver"] in _METADATA.values():
        # A missing chunk must be an error here: TensorStore would read it as zeros.
        spec = {**spec, "fill_missing_data_reads": False, "recheck_cached_data": "open"}
    try:
        store = ts.open(spec, context=context, open=True, read=True).result()
    except (ValueError, NotImplementedError, OSError) as error:
        raise UserError(f"cannot open volume {uri}: {error}") from None
    driver = spec["driver"]
    store, axes, offset_vx_zyx = _as_zyx(store, driver, uri)
    if store.dtype != ts.uint8:
        raise UserError(
            f"volume {uri} holds {store.dtype.name}; only uint8 is supported"
        )
    if driver == "neuroglancer_precomputed":
        stated = tuple(unit.multiplier for unit in store.dimension_units)
        offset_nm = (0.0, 0.0, 0.0)
    else:
        stated, offset_nm = container.physical_nm(driver, metadata, axes, uri)
    voxel_size = _agreed_voxel_size(stated, voxel_size_nm_zyx, uri)
    offset = tuple(
        o + v * s for o, v, s in zip(offset_nm, offset_vx_zyx, voxel_size, strict=True)
    )
    return Volume(uri, voxel_size, offset, store)


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


def crop_starts_vx_zyx(
    positions_nm_zyx: np.ndarray, crop_shape_zyx: Sequence[int], volume: Volume
) -> np.ndarray:
    """`spaces.crop_starts_vx_zyx` in the volume, [n, 3] int64."""
    return spaces.crop_starts_vx_zyx(
        positions_nm_zyx,
        crop_shape_zyx,
        volume.voxel_size_nm_zyx,
        volume.offset_nm_zyx,
    )


def border_status(
    starts_vx_zyx: np.ndarray, shape_zyx: Sequence[int], volume: Volume
) -> np.ndarray:
    """`ok`, `partly_outside` or `outside` for each box, [n] of str objects."""
    stops = starts_vx_zyx + np.asarray(shape_zyx)
    bounds = np.asarray(volume.shape_zyx)
    inside = ((starts_vx_zyx >= 0) & (stops <= bounds)).all(axis=1)
    touching = ((starts_vx_zyx < bounds) & (stops > 0)).all(axis=1)
    return np.where(inside, OK, np.where(touching, PARTLY_OUTSIDE, OUTSIDE)).astype(
        object
    )


def chunk_order(
    starts_vx_zyx: np.ndarray, shape_zyx: Sequence[int], volume: Volume
) -> np.ndarray:
    """Permutation [n] that visits crops along a Z-order curve over chunks.

    Crops whose centres share a chunk are neighbours, and so are neighbouring
    chunks: with a cache of a few chunks each chunk is decoded about once. The order
    depends on nothing but the arguments.
    """
    shape, chunk = np.asarray(shape_zyx), np.asarray(volume.chunk_shape_zyx)
    centres = np.clip(starts_vx_zyx + shape // 2, 0, np.asarray(volume.shape_zyx) - 1)
    cells = centres // chunk
    code = np.zeros(len(cells), np.int64)
    for bit in range(21):
        for axis in range(3):
            code |= ((cells[:, axis] >> bit) & 1) << (3 * bit + 2 - axis)
    z, y, x = centres.T
    return np.lexsort((x, y, z, code))


def read_crops(
    volume: Volume,
    starts_vx_zyx: np.ndarray,
    shape_zyx: Sequence[int],
    bytes_in_flight: int = 256 << 20,
) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields (uint8 crop, whole) for each start, in the order given.

    Voxels outside the volume and voxels of unreadable chunks are 0; `whole` is False
    when a chunk that the crop needs is missing or cannot be decoded. Reads run ahead
    of the consumer by at most `bytes_in_flight`.
    """
    ahead = max(1, bytes_in_flight // math.prod(shape_zyx))
    bounds = np.asarray(volume.shape_zyx)
    waiting: collections.deque[tuple[np.ndarray, np.ndarray, Any]] = collections.deque()
    pending = iter(starts_vx_zyx)
    for start in pending:
        low, high = np.maximum(start, 0), np.minimum(start + shape_zyx, bounds)
        future = None
        if (high > low).all():
            future = volume.store[_box(low, high)].read()
        waiting.append((start, np.stack([low, high]), future))
        if len(waiting) >= ahead:
            yield _finish(volume, shape_zyx, *waiting.popleft())
    while waiting:
        yield _finish(volume, shape_zyx, *waiting.popleft())


def _finish(
    volume: Volume,
    shape_zyx: Sequence[int],
    start: np.ndarray,
    box: np.ndarray,
    future: Any,
) -> tuple[np.ndarray, bool]:
    crop = np.zeros(shape_zyx, np.uint8)
    if future is None:
        return crop, True
    into = crop[_box(*(box - start))]
    try:
        into[...] = future.result()
    except ValueError as error:
        if not _is_unreadable_chunk(error):
            raise UserError(f"cannot read {volume.uri}: {error}") from None
        _read_present_chunks(volume, box, into)
        return crop, False
    return crop, True


def _read_present_chunks(volume: Volume, box: np.ndarray, into: np.ndarray) -> None:
    """Fills `into` from those chunks of `box` that exist."""
    chunk = np.asarray(volume.chunk_shape_zyx)
    # The grid's origin is not 0 where the container's domain did not start at 0.
    origin = np.asarray(volume.store.chunk_layout.grid_origin)
    first, last = (box[0] - origin) // chunk, (box[1] - 1 - origin) // chunk
    for cell in np.ndindex(*(last - first + 1)):
        corner = origin + (first + cell) * chunk
        low, high = np.maximum(box[0], corner), np.minimum(box[1], corner + chunk)
        try:
            data = volume.read(low, high)
        except ValueError as error:
            if not _is_unreadable_chunk(error):
                raise UserError(f"cannot read {volume.uri}: {error}") from None
        else:
            into[_box(low - box[0], high - box[0])] = data


def _is_unreadable_chunk(error: ValueError) -> bool:
    # TensorStore's Python errors carry their status code as text only.
    return str(error).startswith(_UNREADABLE)


def _box(start: Sequence[int], stop: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


def _find(uri: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The TensorStore spec of `uri` and the container's own metadata."""
    if uri.lstrip().startswith("{"):
        try:
            spec = json.loads(uri)
        except json.JSONDecodeError as error:
            raise UserError(f"volume spec is not valid JSON: {error}") from None
        if "driver" not in spec:
            raise UserError('volume spec has no "driver"')
        names = [n for n, d in _METADATA.items() if d == spec["driver"]]
        if not names:
            return spec, {}
        metadata = _read_metadata(
            _open_kvstore(spec.get("kvstore"), uri), names[0], uri
        )
        if not metadata:
            raise UserError(f"no volume at {uri}: {names[0]} is not there")
        return spec, metadata
    url = uri if "://" in uri else pathlib.Path(uri).resolve().as_uri()
    base = _open_kvstore(url, uri)
    for name, driver in _METADATA.items():
        metadata = _read_metadata(base, name, uri)
        if not metadata:
            continue
        is_group = (driver == "n5" and "dimensions" not in metadata) or (
            driver == "zarr3" and metadata.get("node_type") == "group"
        )
        if is_group:
            raise UserError(
                f"{uri} is a {driver} container, not an array in it; name the data "
                "set too, for example volumes/raw/s0"
            )
        return {"driver": driver, "kvstore": base.spec().to_json()}, metadata
    raise UserError(
        f"no volume at {uri}: none of {', '.join(_METADATA)} is there "
        "(N5, Zarr 3, Zarr 2, precomputed)"
    )


def _open_kvstore(kvstore: Any, uri: str) -> ts.KvStore:
    # TensorStore takes an array's path with and without the slash at its end; names
    # of files below it need one.
    if isinstance(kvstore, str):
        kvstore = kvstore.rstrip("/") + "/"
    elif isinstance(kvstore, dict) and kvstore.get("path"):
        kvstore = kvstore | {"path": kvstore["path"].rstrip("/") + "/"}
    try:
        return ts.KvStore.open(kvstore).result()
    except (ValueError, NotImplementedError, OSError) as error:
        raise UserError(f"cannot open volume {uri}: {error}") from None


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
    """{} where there is no such file."""
    try:
        read = base.read(name).result()
        return json.loads(read.value) if read.state == "value" else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{name} of volume {uri} is not valid JSON: {error}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {name} of volume {uri}: {error}") from None


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
    if stated is None and expected is None:
        raise UserError(
            f"volume {uri} does not state its voxel size; give voxel_size_nm_zyx"
        )
    if stated is None:
        return tuple(float(v) for v in expected)
    if expected is not None and not np.allclose(stated, expected, rtol=1e-6):
        raise UserError(
            f"volume {uri} has voxels of {_text(stated)} nm (z, y, x) but "
            f"{_text(expected)} nm are expected; use the matching volume or config"
        )
    return stated


def _text(size: Sequence[float]) -> str:
    return "×".join(f"{v:g}" for v in size)
