# SPDX-License-Identifier: Apache-2.0
"""A texture, from a volume or of blobs, and volumes tiled of it."""

import hashlib
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from synister_jax import volumes
from synister_jax.command import UserError


def load(
    uri: str | None, at_most_zyx: Sequence[int], at_least_zyx: Sequence[int]
) -> np.ndarray:
    """uint8 [z, y, x]: the corner of a volume; of none, blobs that tile seamlessly.

    Raises:
      UserError: it is smaller than `at_least_zyx`.
    """
    if uri:
        source = volumes.open(uri)
        texture = source.read((0, 0, 0), np.minimum(source.shape_zyx, at_most_zyx))
    else:
        values = np.random.default_rng(0).standard_normal((32, 512, 512), np.float32)
        smooth = ndimage.gaussian_filter(values, (1, 3, 3), mode="wrap")
        texture = np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    if np.less(texture.shape, at_least_zyx).any():
        raise UserError(
            f"the texture {uri or 'noise'}, {texture.shape}, is smaller than "
            f"{tuple(at_least_zyx)}"
        )
    return texture


def tiled(
    folder: pathlib.Path,
    texture: np.ndarray,
    shape_zyx: Sequence[int],
    voxel_size_nm_zyx: Sequence[float],
) -> pathlib.Path:
    """An N5 volume (gzip, chunks of 16×128×128), made where it is not there."""
    made_of = texture.tobytes() + repr((shape_zyx, voxel_size_nm_zyx)).encode()
    path = folder / f"{hashlib.sha256(made_of).hexdigest()[:12]}.n5"
    if path.exists():
        return path
    tiles = -(-np.asarray(shape_zyx) // texture.shape)
    voxels = np.tile(texture, tiles)[volumes.box_of((0, 0, 0), shape_zyx)]
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    volumes.write_n5(partial, voxels, voxel_size_nm_zyx)
    return partial.rename(path)
