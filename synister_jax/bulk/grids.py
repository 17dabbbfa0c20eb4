# SPDX-License-Identifier: Apache-2.0
"""A regular grid of points in a region, and the volume of what was predicted there.

The points are the rows of a synapse table, z slowest, so whatever answers a table
answers a grid. The answers go into an OME-Zarr 0.4 group of Zarr 2 that neuroglancer,
Fiji and funlib read: its one array is written through TensorStore.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.em import volumes
from synister_jax.tables import synapses

_MOST_POINTS = 2**40
_MOST_CHUNK_VX = 64
_SLAB_BYTES = 256 << 20
_AXES = ("c", "z", "y", "x")

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The points `begin + i·step` below `end`, axis by axis, in C order."""

    begin_nm_zyx: Triple
    end_nm_zyx: Triple
    step_nm_zyx: Triple

    @classmethod
    def of(cls, roi_texts: Sequence[str], step_texts: Sequence[str]) -> "Grid":
        """The grid of the flags, each split at its commas.

        Args:
          roi_texts: of `--roi_nm_zyx=Z0:Z1,Y0:Y1,X0:X1`.
          step_texts: of `--step_nm_zyx=DZ,DY,DX`.

        Raises:
          UserError: names the flag: not three ranges or numbers, not finite, an empty
            range, a step that is not above 0 or leads to too many points.
        """
        step = command.three_numbers("step_nm_zyx", step_texts, positive=True)
        given = f"--roi_nm_zyx={','.join(roi_texts)}"
        ends = [text.split(":") for text in roi_texts]
        if len(ends) != 3 or any(len(pair) != 2 for pair in ends):
            raise UserError(f"{given}: the flag takes three ranges, Z0:Z1,Y0:Y1,X0:X1")
        try:
            begin = command.three_numbers("roi_nm_zyx", [low for low, _ in ends])
            end = command.three_numbers("roi_nm_zyx", [high for _, high in ends])
        except UserError:
            raise UserError(f"{given}: not three ranges of finite numbers") from None
        too_small = (
            f"--step_nm_zyx={','.join(step_texts)} is too small for {given}: "
            f"{_MOST_POINTS:,} points are the most; take larger steps"
        )
        for low, high, width in zip(begin, end, step, strict=True):
            if low >= high:
                raise UserError(
                    f"{given}: {low:g}:{high:g} is empty; the end must be greater"
                )
            # Below that distance neighbouring points would be the same float.
            apart = math.ulp(max(-low, high))
            if (high - low) / width > _MOST_POINTS or width < apart:
                raise UserError(too_small)
        grid = cls(begin, end, step)
        if math.prod(grid.shape_zyx) > _MOST_POINTS:
            raise UserError(too_small)
        return grid

    @property
    def shape_zyx(self) -> tuple[int, ...]:
        axes = zip(self.begin_nm_zyx, self.end_nm_zyx, self.step_nm_zyx, strict=True)
        return tuple(_points_below(*axis) for axis in axes)

    def __len__(self) -> int:
        return math.prod(self.shape_zyx)

    def batches(self, rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """The points as rows of a synapse table, at most `rows` at a time.

        `synapse_id` is the place of the point in the grid; all that a grid does not
        know is null.
        """
        for first in range(0, len(self), rows):
            ids = np.arange(first, min(first + rows, len(self)), dtype=np.int64)
            columns = {"synapse_id": pa.array(ids)}
            indices = np.unravel_index(ids, self.shape_zyx)
            for axis, name in enumerate(synapses.POSITION):
                values = (
                    self.begin_nm_zyx[axis] + indices[axis] * self.step_nm_zyx[axis]
                )
                columns[name] = pa.array(values)
            arrays = [
                columns[field.name]
                if field.name in columns
                else pa.nulls(len(ids), field.type)
                for field in synapses.SCHEMA
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=synapses.SCHEMA)


def _points_below(begin: float, end: float, step: float) -> int:
    """How many of `begin + i·step`, rounded as floats are, lie below `end`."""
    count = math.ceil((end - begin) / step)
    # The quotient is rounded too: 0.1:0.4 by 0.1 gives 4, but 0.1 + 3·0.1 is 0.4.
    while begin + count * step < end:
        count += 1
    while begin + (count - 1) * step >= end:
        count -= 1
    return count


def write_zarr(
    path: str | os.PathLike[str],
    grid: Grid,
    classes: Sequence[str],
    pieces: Iterable[np.ndarray],
    about: Mapping[str, Any],
) -> None:
    """Writes probabilities as the OME-Zarr group `path`, whole or not at all.

    Its array `0` is float32 [class, z, y, x]; a voxel's centre is the grid's point. A
    chunk that is NaN throughout has no file: NaN is the fill value. The bytes depend on
    the values and not on how they come in pieces. In memory is one slab of chunks.

    Args:
      pieces: float32 [m, classes], any m: the rows of `grid.batches` in their order.
      about: what made them (run, step, volume, …), kept in the group's attributes.

    Raises:
      UserError: there are fewer or more rows than points or another number of classes,
        the folder cannot be written, or something else has its name.
    """
    path = pathlib.Path(path)
    shape = (len(classes), *grid.shape_zyx)
    bytes_a_section = 4 * math.prod(shape) // shape[1]
    deepest = max(1, _SLAB_BYTES // bytes_a_section)
    chunk = [1, *(min(_MOST_CHUNK_VX, size) for size in shape[1:])]
    chunk[1] = min(chunk[1], deepest)
    metadata = {
        "shape": shape,
        "chunks": chunk,
        "dtype": "<f4",
        "fill_value": "NaN",
        "dimension_separator": "/",
        # What every reader of Zarr 2 can read; some know no zstd of its own.
        "compressor": {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 1},
    }
    if path.exists() and not _is_ours(path):
        raise UserError(
            f"{path} is there and holds no predictions on a grid; remove it or choose "
            "another name"
        )
    with files.replacing_folder(path) as partial:
        store = volumes.create_zarr(partial / "0", metadata)
        for z, slab in _slabs(path, shape, chunk[1], pieces):
            volumes.written(path, store[:, z : z + slab.shape[1]].write(slab))
        _write_attributes(path.stem, partial, grid, classes, about)


def _slabs(
    path: pathlib.Path,
    shape: Sequence[int],
    depth: int,
    pieces: Iterable[np.ndarray],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (z, float32 [class, at most `depth`, y, x]); the array is used again."""
    classes, sections, *plane = shape
    rows_a_section = math.prod(plane)
    total = sections * rows_a_section
    slab = np.empty((classes, depth, *plane), np.float32)
    flat = slab.reshape(classes, -1)
    z = filled = 0  # rows of the slab that begins at z
    for piece in pieces:
        if piece.ndim != 2 or piece.shape[1] != classes:
            raise UserError(
                f"cannot write {path}: probabilities came as {list(piece.shape)} for "
                f"{classes} classes; name the classes of the network"
            )
        if z * rows_a_section + filled + len(piece) > total:
            raise UserError(
                f"cannot write {path}: more than {total:,} predictions came for the "
                f"{total:,} points of the grid; predict the same grid"
            )
        while len(piece):
            here = min(depth, sections - z)
            taken, piece = np.split(piece, [here * rows_a_section - filled])
            flat[:, filled : filled + len(taken)] = taken.T
            filled += len(taken)
            if filled == here * rows_a_section:
                yield z, slab[:, :here]
                z, filled = z + here, 0
    if z < sections:
        raise UserError(
            f"cannot write {path}: {z * rows_a_section + filled:,} predictions came "
            f"for the {total:,} points of the grid; predict the same grid"
        )


def _write_attributes(
    name: str,
    folder: pathlib.Path,
    grid: Grid,
    classes: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}]
    axes += [{"name": n, "type": "space", "unit": "nanometer"} for n in _AXES[1:]]
    transformations = [
        {"type": "scale", "scale": [1.0, *grid.step_nm_zyx]},
        {"type": "translation", "translation": [0.0, *grid.begin_nm_zyx]},
    ]
    multiscale = {
        "version": "0.4",
        "name": name,
        "axes": axes,
        "datasets": [{"path": "0", "coordinateTransformations": transformations}],
    }
    group = {
        "multiscales": [multiscale],
        "_ARRAY_DIMENSIONS": _AXES,
        "classes": list(classes),
        "synister_jax": dict(about),
    }
    array = {
        "_ARRAY_DIMENSIONS": _AXES,
        "offset": grid.begin_nm_zyx,
        "resolution": grid.step_nm_zyx,
        "units": ["nm"] * 3,
    }
    files.write_json(folder / ".zgroup", {"zarr_format": 2})
    files.write_json(folder / ".zattrs", group)
    files.write_json(folder / "0" / ".zattrs", array)


def _is_ours(path: pathlib.Path) -> bool:
    try:
        return "synister_jax" in json.loads((path / ".zattrs").read_bytes())
    except (OSError, ValueError):
        return False
