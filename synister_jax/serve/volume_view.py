# SPDX-License-Identifier: Apache-2.0
"""Serves a volume of any container format to Neuroglancer as a precomputed image.

Format: google/neuroglancer, src/datasource/precomputed/volume.md. The image has one
scale with raw chunks, without sharding.
"""

import re
from typing import Any

import numpy as np

from synister_jax.em import crops
from synister_jax.em.volumes import Volume

_CHUNK = 64  # voxels
_THIN = 16  # voxels in z, if a voxel is at least 3 times as long in z as in x and y
_NAME = re.compile(r"_".join([r"(-?[0-9]{1,10})-(-?[0-9]{1,10})"] * 3), re.ASCII)

Corner = tuple[int, int, int]  # x, y, z


def info(volume: Volume) -> dict[str, Any]:
    """Returns the `info` of the image, whose only scale is `s0`."""
    return {
        "@type": "neuroglancer_multiscale_volume",
        "type": "image",
        "data_type": "uint8",
        "num_channels": 1,
        "scales": [
            {
                "key": "s0",
                "size": list(volume.shape_zyx[::-1]),
                "resolution": list(volume.voxel_size_nm_zyx[::-1]),
                "voxel_offset": _offset_xyz(volume).tolist(),
                "chunk_sizes": [_chunk_xyz(volume).tolist()],
                "encoding": "raw",
            }
        ],
    }


def parse(name: str) -> tuple[Corner, Corner] | None:
    """Returns the corners of a chunk from its name `x0-x1_y0-y1_z0-z1`.

    The corners are in voxels. The result is None if the name has another form.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    x0, x1, y0, y1, z0, z1 = map(int, found.groups())
    return (x0, y0, z0), (x1, y1, z1)


def chunk(volume: Volume, starts_xyz: Corner, stops_xyz: Corner) -> bytes | None:
    """Returns the voxels of a chunk as uint8, x fastest.

    Voxels that the volume does not have are 0.

    Args:
      volume: The volume.
      starts_xyz: The first voxel of the chunk.
      stops_xyz: The voxel behind the last voxel of the chunk.

    Returns:
      The voxels, or None if the grid has no chunk with these corners.

    Raises:
      UserError: The volume is missing, cannot be reached, or must not be read.
    """
    size, chunk_xyz = np.array(volume.shape_zyx[::-1]), _chunk_xyz(volume)
    starts = np.array(starts_xyz) - _offset_xyz(volume)
    stops = np.minimum(starts + chunk_xyz, size)
    inside = ((starts >= 0) & (starts < size) & (starts % chunk_xyz == 0)).all()
    if not inside or (stops + _offset_xyz(volume) != np.array(stops_xyz)).any():
        return None
    [crop] = crops.read(volume, starts[None, ::-1], tuple((stops - starts)[::-1]))
    return np.ascontiguousarray(crop.voxels).tobytes()  # z slowest, x fastest


def _offset_xyz(volume: Volume) -> np.ndarray:
    offset = np.array(volume.offset_nm_zyx) / np.array(volume.voxel_size_nm_zyx)
    return np.round(offset[::-1]).astype(np.int64)


def _chunk_xyz(volume: Volume) -> np.ndarray:
    z, y, x = volume.voxel_size_nm_zyx
    return np.array([_CHUNK, _CHUNK, _THIN if z >= 3 * max(y, x) else _CHUNK])
