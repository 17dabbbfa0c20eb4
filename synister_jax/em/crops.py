# SPDX-License-Identifier: Apache-2.0
"""Crops of a volume: where they are, which chunks they need, and their voxels."""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from synister_jax.base.errors import UserError
from synister_jax.em import spaces, volumes
from synister_jax.em.volumes import Volume, box_of

OK = "ok"
PARTLY_OUTSIDE = "partly_outside"
OUTSIDE = "outside"
MISSING_DATA = "missing_data"

Corner = tuple[int, ...]  # first voxel of a chunk, (z, y, x)

# TensorStore's errors for a chunk that is absent, incomplete or not decodable. Any
# other error (network, permission) stops the command, because TensorStore has already
# repeated the request (`volumes.RETRIES`) if that can help.
_UNREADABLE = ("NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "OUT_OF_RANGE")


def starts_vx_zyx(
    positions_nm_zyx: np.ndarray, shape_zyx: Sequence[int], volume: Volume
) -> np.ndarray:
    """Returns the first voxel of the crop around each position, [n, 3] int64.

    Args:
      positions_nm_zyx: [n, 3] in nm, in the volume frame.
      shape_zyx: the shape of a crop in voxels.
    """
    return spaces.crop_starts_vx_zyx(
        positions_nm_zyx,
        shape_zyx,
        volume.voxel_size_nm_zyx,
        volume.offset_nm_zyx,
    )


def border_status(
    starts_vx_zyx: np.ndarray, shape_zyx: Sequence[int], volume: Volume
) -> np.ndarray:
    """Returns `ok`, `partly_outside` or `outside` for each crop, [n] of str objects.

    Args:
      starts_vx_zyx: the first voxel of each crop, [n, 3].
      shape_zyx: the shape of a crop in voxels.
    """
    stops = starts_vx_zyx + np.asarray(shape_zyx)
    bounds = np.asarray(volume.shape_zyx)
    inside = ((starts_vx_zyx >= 0) & (stops <= bounds)).all(axis=1)
    touching = ((starts_vx_zyx < bounds) & (stops > 0)).all(axis=1)
    names = np.array([OUTSIDE, PARTLY_OUTSIDE, OK], object)
    return names[touching.astype(np.int8) + inside]


def chunk_codes(
    starts_vx_zyx: np.ndarray, shape_zyx: Sequence[int], volume: Volume
) -> np.ndarray:
    """Returns a code for the chunk that holds the centre of each crop, [n] int64.

    The code is the place of the chunk along a Z-order curve. If crops are read in the
    order of their codes, crops in neighbouring chunks are read together. Then each
    chunk is decoded about once, although the cache holds only some chunks.

    Args:
      starts_vx_zyx: the first voxel of each crop, [n, 3].
      shape_zyx: the shape of a crop in voxels.
    """
    centres = starts_vx_zyx + np.asarray(shape_zyx) // 2
    places = np.clip(centres, 0, np.asarray(volume.shape_zyx) - 1)
    origin = np.asarray(volume.store.chunk_layout.grid_origin)  # 0 or negative
    z, y, x = ((places - origin) // np.asarray(volume.chunk_shape_zyx)).T
    return _spread(z) << 2 | _spread(y) << 1 | _spread(x)


def _spread(cells: np.ndarray) -> np.ndarray:
    """Moves bit i of every 21-bit number to bit 3·i.

    There are five steps. Each moves bits half as far as the step before.
    """
    code = cells.astype(np.int64)
    code = (code | code << 32) & 0x001F00000000FFFF
    code = (code | code << 16) & 0x001F0000FF0000FF
    code = (code | code << 8) & 0x100F00F00F00F00F
    code = (code | code << 4) & 0x10C30C30C30C30C3
    return (code | code << 2) & 0x1249249249249249


def order(
    starts_vx_zyx: np.ndarray, shape_zyx: Sequence[int], volume: Volume
) -> np.ndarray:
    """Returns the order in which the crops are read, a permutation [n].

    The crops are sorted by `chunk_codes`, and within a chunk by their positions,
    because neighbours need the same chunks. The same arguments always give the same
    order.

    Args:
      starts_vx_zyx: the first voxel of each crop, [n, 3].
      shape_zyx: the shape of a crop in voxels.
    """
    z, y, x = np.transpose(starts_vx_zyx)
    return np.lexsort((x, y, z, chunk_codes(starts_vx_zyx, shape_zyx, volume)))


def count_chunks(
    starts_vx_zyx: np.ndarray, shape_zyx: Sequence[int], volume: Volume
) -> int:
    """Returns how many chunks the crops need. A chunk of several crops counts once."""
    chunk = np.asarray(volume.chunk_shape_zyx)
    origin = np.asarray(volume.store.chunk_layout.grid_origin)
    low = np.maximum(starts_vx_zyx, 0)
    high = np.minimum(starts_vx_zyx + shape_zyx, volume.shape_zyx)
    inside = (high > low).all(axis=1)
    low, high = low[inside], high[inside]
    first, last = (low - origin) // chunk, (high - 1 - origin) // chunk
    _, rows, columns = (np.asarray(volume.shape_zyx) - origin) // chunk + 1
    found = [np.zeros(0, np.int64)]
    for offset in np.ndindex(*((last - first).max(axis=0, initial=-1) + 1)):
        z, y, x = (first + offset)[(first + offset <= last).all(axis=1)].T
        found.append(np.unique((z * rows + y) * columns + x))
    return len(np.unique(np.concatenate(found)))


class Crop(NamedTuple):
    """A crop and the chunks of it that cannot be read. Their voxels are 0."""

    voxels: np.ndarray  # uint8 [z, y, x]
    unreadable: tuple[Corner, ...]  # first voxels of the chunks


def read(
    volume: Volume,
    starts_vx_zyx: np.ndarray,
    shape_zyx: Sequence[int],
    bytes_in_flight: int = 256 << 20,
) -> Iterator[Crop]:
    """Yields the crop of each start, in the order given.

    Voxels outside the volume are 0. Voxels of unreadable chunks, which are missing or
    cannot be decoded, are 0, too.

    Args:
      volume: the volume.
      starts_vx_zyx: the first voxel of each crop, [n, 3].
      shape_zyx: the shape of a crop in voxels.
      bytes_in_flight: read ahead crops of at most this many bytes, at least one crop.

    Raises:
      UserError: the volume no longer exists, cannot be reached, or may not be read.
    """
    ahead = max(1, bytes_in_flight // math.prod(shape_zyx))
    bounds = np.asarray(volume.shape_zyx)
    waiting: collections.deque[tuple[np.ndarray, np.ndarray, Any]] = collections.deque()
    pending = iter(starts_vx_zyx)
    for start in pending:
        low, high = np.maximum(start, 0), np.minimum(start + shape_zyx, bounds)
        future = None
        if (high > low).all():
            future = volume.start_reading(low, high)
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
) -> Crop:
    if future is None:
        return Crop(np.zeros(shape_zyx, np.uint8), ())
    unreadable: tuple[Corner, ...] = ()
    try:
        found = future.result()
    except volumes.ERRORS as error:
        _raise_unless_chunk(volume, error)
        found, unreadable = _read_present_chunks(volume, box)
    if found.shape == tuple(shape_zyx):
        return Crop(found, unreadable)
    voxels = np.zeros(shape_zyx, np.uint8)
    voxels[box_of(*(box - start))] = found
    return Crop(voxels, unreadable)


def _read_present_chunks(
    volume: Volume, box: np.ndarray
) -> tuple[np.ndarray, tuple[Corner, ...]]:
    """Reads the box chunk by chunk. Returns its voxels and the unreadable chunks."""
    found = np.zeros(box[1] - box[0], np.uint8)
    chunk = np.asarray(volume.chunk_shape_zyx)
    # The origin of the grid is not 0 if the container's domain does not start at 0.
    origin = np.asarray(volume.store.chunk_layout.grid_origin)
    first, last = (box[0] - origin) // chunk, (box[1] - 1 - origin) // chunk
    reads = []
    for cell in np.ndindex(*(last - first + 1)):
        corner = origin + (first + cell) * chunk
        low, high = np.maximum(box[0], corner), np.minimum(box[1], corner + chunk)
        # The cache still says that a chunk is missing when the chunk is back, so the
        # source is asked.
        future = volume.start_reading(low, high, fresh=True)
        reads.append((corner, box_of(low - box[0], high - box[0]), future))
    unreadable = []
    for corner, place, future in reads:
        try:
            found[place] = future.result()
        except volumes.ERRORS as error:
            _raise_unless_chunk(volume, error)
            unreadable.append(tuple(np.maximum(corner, 0).tolist()))
    if unreadable:
        volume.check_present()
    return found, tuple(unreadable)


def _raise_unless_chunk(volume: Volume, error: Exception) -> None:
    # TensorStore's Python errors have their status code only in their text.
    reason = volumes.reason(error)
    if reason.startswith(_UNREADABLE):
        return
    advice = (
        "results that are already written are kept, run again when the volume can be "
        "read"
    )
    if reason.startswith("PERMISSION_DENIED"):
        advice = (
            "check your credentials (a store may also give this error for a missing "
            "chunk, if you may not list its files)"
        )
    raise UserError(f"cannot read volume {volume.uri}: {reason}; {advice}") from None
