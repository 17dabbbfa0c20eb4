# SPDX-License-Identifier: Apache-2.0
"""One small volume in every container format."""

import functools
import json
import pathlib

import numpy as np
import tensorstore as ts

from synister_jax.em import volumes

SHAPE_ZYX = (20, 30, 40)
CHUNK_ZYX = (8, 16, 16)
VOXEL_SIZE_NM_ZYX = (40.0, 4.0, 5.0)
# The value of a voxel depends on its position, so that tests notice exchanged axes.
Z, Y, X = np.indices(SHAPE_ZYX)
ARRAY_ZYX = ((Z * 31 + Y * 7 + X * 3) % 251).astype(np.uint8)
# A smooth array, because JPEG changes its voxels by at most 2 grey values.
SMOOTH_ZYX = (Z * 6 + Y * 2 + X).astype(np.uint8)


def make_n5(path: pathlib.Path, array_zyx: np.ndarray = ARRAY_ZYX) -> None:
    volumes.write_n5(path, array_zyx, VOXEL_SIZE_NM_ZYX, (400, 80, 120), CHUNK_ZYX)


def make_zarr(
    path: pathlib.Path,
    array_zyx: np.ndarray = ARRAY_ZYX,
    driver: str = "zarr",
    sharded: bool = False,
) -> None:
    if driver == "zarr":
        metadata = {"shape": SHAPE_ZYX, "dtype": "|u1", "chunks": CHUNK_ZYX}
        metadata["fill_value"] = 0
    else:
        metadata = {"shape": SHAPE_ZYX, "data_type": "uint8"}
        grid = {"chunk_shape": CHUNK_ZYX}
        if sharded:
            shard = {"chunk_shape": CHUNK_ZYX, "codecs": [{"name": "gzip"}]}
            codec = {"name": "sharding_indexed", "configuration": shard}
            metadata["codecs"] = [codec]
            grid = {"chunk_shape": [2 * n for n in CHUNK_ZYX]}
        metadata["chunk_grid"] = {"name": "regular", "configuration": grid}
    kvstore = {"driver": "file", "path": f"{path}/"}
    spec = {"driver": driver, "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result().write(array_zyx).result()
    attributes = {"resolution": VOXEL_SIZE_NM_ZYX, "offset": [400, 80, 120]}
    if driver == "zarr":
        (path / ".zattrs").write_text(json.dumps(attributes))
    else:
        stored = json.loads((path / "zarr.json").read_text())
        stored["attributes"] = attributes
        (path / "zarr.json").write_text(json.dumps(stored))


def make_precomputed(
    path: pathlib.Path,
    array_zyx: np.ndarray = ARRAY_ZYX,
    encoding: str = "raw",
    sharded: bool = False,
) -> None:
    scale = {
        "size": SHAPE_ZYX[::-1],
        "voxel_offset": [24, 20, 10],
        "resolution": VOXEL_SIZE_NM_ZYX[::-1],
        "chunk_size": CHUNK_ZYX[::-1],
        "encoding": encoding,
    }
    if encoding == "jpeg":
        scale["jpeg_quality"] = 95
    if sharded:
        scale["sharding"] = {
            "@type": "neuroglancer_uint64_sharded_v1",
            "preshift_bits": 1,
            "hash": "identity",
            "minishard_bits": 1,
            "shard_bits": 1,
            "minishard_index_encoding": "gzip",
            "data_encoding": "raw" if encoding == "jpeg" else "gzip",
        }
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "multiscale_metadata": {
            "type": "image",
            "data_type": "uint8",
            "num_channels": 1,
        },
        "scale_metadata": scale,
    }
    store = ts.open(spec, create=True).result()
    store.write(array_zyx.transpose()[..., None]).result()


# Each function takes the path and optionally another array. Chunks of zeros are not
# stored.
MAKERS = {
    "n5": make_n5,
    "zarr": make_zarr,
    "zarr3": functools.partial(make_zarr, driver="zarr3"),
    "zarr3_sharded": functools.partial(make_zarr, driver="zarr3", sharded=True),
    "precomputed": make_precomputed,
    "precomputed_sharded": functools.partial(make_precomputed, sharded=True),
}

# JPEG is lossy: see `SMOOTH_ZYX`.
JPEG_MAKERS = {
    "precomputed_jpeg": functools.partial(make_precomputed, encoding="jpeg"),
    "precomputed_sharded_jpeg": functools.partial(
        make_precomputed, encoding="jpeg", sharded=True
    ),
}
