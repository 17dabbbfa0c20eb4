# SPDX-License-Identifier: Apache-2.0
"""A texture, from a volume or of blobs; volumes tiled of it; what is read of them."""

import hashlib
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
import tensorstore as ts
from scipy import ndimage

from synister_jax.base.errors import UserError
from synister_jax.em import volumes

_CHUNK_ZYX = (16, 128, 128)


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
    made_of = hashlib.sha256(np.ascontiguousarray(texture))
    made_of.update(repr((shape_zyx, voxel_size_nm_zyx)).encode())
    path = folder / f"{made_of.hexdigest()[:12]}.n5"
    if path.exists():
        return path
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Zeros that take no memory and that TensorStore does not store; then the slabs.
    zeros = np.broadcast_to(np.uint8(0), shape_zyx)
    volumes.write_n5(partial, zeros, voxel_size_nm_zyx, chunk_shape_zyx=_CHUNK_ZYX)
    kvstore = {"driver": "file", "path": f"{partial}/"}
    store = ts.open({"driver": "n5", "kvstore": kvstore}).result().T
    rows, columns = (np.arange(shape_zyx[a]) % texture.shape[a] for a in (1, 2))
    for z in range(0, shape_zyx[0], _CHUNK_ZYX[0]):
        sections = np.arange(z, min(z + _CHUNK_ZYX[0], shape_zyx[0]))
        slab = texture[np.ix_(sections % texture.shape[0], rows, columns)]
        store[z : z + len(slab)].write(slab).result()
    return partial.rename(path)


def chunks_read() -> int:
    """Chunks that were in no cache of TensorStore, since the process began."""
    name = "/tensorstore/cache/miss_count"
    metrics = ts.experimental_collect_matching_metrics(name)
    return sum(value["value"] for metric in metrics for value in metric["values"])
