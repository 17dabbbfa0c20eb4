# SPDX-License-Identifier: Apache-2.0
"""Makes a regular grid of points in a region, and writes its predictions as a volume.

The points are given as the rows of a synapse table, with z changing slowest. Code that
predicts a table can therefore predict a grid. The predictions are written as an
OME-Zarr 0.4 group (Zarr 2), which neuroglancer, Fiji and funlib can read. The group has
one array, and TensorStore writes this array.
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
    """The points `begin + i·step` that are below `end` on every axis, in C order."""

    begin_nm_zyx: Triple
    end_nm_zyx: Triple
    step_nm_zyx: Triple

    @classmethod
    def of(cls, roi_texts: Sequence[str], step_texts: Sequence[str]) -> "Grid":
        """Returns the grid that two flags describe.

        Args:
          roi_texts: the value of `--roi_nm_zyx=Z0:Z1,Y0:Y1,X0:X1`, split at its commas.
          step_texts: the value of `--step_nm_zyx=DZ,DY,DX`, split at its commas.

        Raises:
          UserError: a flag does not have three finite ranges or numbers, a range is
            empty, or a step is not above 0 or gives too many points. The message names
            the flag.
        """
        step = command.three_numbers("step_nm_zyx", step_texts, positive=True)
        given = f"--roi_nm_zyx={','.join(roi_texts)}"
        ends = [text.split(":") for text in roi_texts]
        if len(ends) != 3 or any(len(pair) != 2 for pair in ends):
            raise UserError(
                f"{given}: the flag takes three ranges; give Z0:Z1,Y0:Y1,X0:X1"
            )
        try:
            begin = command.three_numbers("roi_nm_zyx", [low for low, _ in ends])
            end = command.three_numbers("roi_nm_zyx", [high for _, high in ends])
        except UserError:
            raise UserError(
                f"{given}: the values are not three ranges of finite numbers; give "
                "Z0:Z1,Y0:Y1,X0:X1"
            ) from None
        too_small = (
            f"--step_nm_zyx={','.join(step_texts)} is too small for {given}: "
            f"a grid can have at most {_MOST_POINTS:,} points; give a larger step"
        )
        for low, high, width in zip(begin, end, step, strict=True):
            if low >= high:
                raise UserError(
                    f"{given}: the range {low:g}:{high:g} is empty; the end must be "
                    "greater than the start"
                )
            # With a smaller step, neighbouring points would be the same float.
            apart = math.ulp(max(-low, high))
            if (high - low) / width > _MOST_POINTS or width < apart:
                raise UserError(too_small)
        grid = cls(begin, end, step)
        if math.prod(grid.shape_zyx) > _MOST_POINTS:
            raise UserError(too_small)
        return grid

    @property
    def shape_zyx(self) -> tuple[int, ...]:
        """The number of points along z, y and x."""
        axes = zip(self.begin_nm_zyx, self.end_nm_zyx, self.step_nm_zyx, strict=True)
        return tuple(_points_below(*axis) for axis in axes)

    def __len__(self) -> int:
        return math.prod(self.shape_zyx)

    def batches(self, rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """Yields the points as rows of a synapse table, at most `rows` in a batch.

        `synapse_id` is the index of the point in the grid, from 0. The position is in
        nm. All other columns are null.
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
    """Returns how many of the points `begin + i·step`, as floats, are below `end`."""
    count = math.ceil((end - begin) / step)
    # The quotient is rounded too, so `count` can be wrong. For 0.1:0.4 with step 0.1 it
    # is 4, but the fourth point 0.1 + 3·0.1 is 0.4 and not below the end.
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
    """Writes probabilities as the OME-Zarr group `path`, completely or not at all.

    The array `0` of the group is float32 [class, z, y, x]. The centre of each voxel is
    a point of the grid. A chunk that has only NaN gets no file, because NaN is the fill
    value. The written bytes depend on the values, and not on the lengths of the pieces.
    Memory holds one slab of chunks at a time.

    Args:
      path: the folder of the group. An older grid of predictions there is replaced.
      classes: the names of the classes, in the order of the network outputs.
      pieces: float32 [m, classes], with any m: the probabilities of the points, in the
        order of `grid.batches`.
      about: what made the predictions (run, step, volume, …). It is stored in the
        attributes of the group.

    Raises:
      UserError: the number of rows is not the number of points, the number of classes
        is wrong, the folder cannot be written, or `path` holds something else.
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
        # Some readers of Zarr 2 cannot read plain zstd, but all can read blosc.
        "compressor": {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 1},
    }
    if path.exists() and not _is_ours(path):
        raise UserError(
            f"{path} exists and does not hold predictions on a grid; remove it or "
            "choose another name"
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
    """Yields (z, float32 [class, at most `depth`, y, x]).

    The next slab overwrites the array.
    """
    classes, sections, *plane = shape
    rows_a_section = math.prod(plane)
    total = sections * rows_a_section
    slab = np.empty((classes, depth, *plane), np.float32)
    flat = slab.reshape(classes, -1)
    z = filled = 0  # `filled` counts the rows of the slab that begins at z
    for piece in pieces:
        if piece.ndim != 2 or piece.shape[1] != classes:
            raise UserError(
                f"cannot write {path}: the probabilities have the shape "
                f"{list(piece.shape)}, but {classes} classes are named; name the "
                "classes of the network"
            )
        if z * rows_a_section + filled + len(piece) > total:
            raise UserError(
                f"cannot write {path}: there are more than {total:,} predictions for "
                f"the {total:,} points of the grid; give one for each point"
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
            f"cannot write {path}: there are {z * rows_a_section + filled:,} "
            f"predictions for the {total:,} points of the grid; give one for each point"
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
