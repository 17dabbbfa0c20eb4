# SPDX-License-Identifier: Apache-2.0
"""Makes volumes, synapses, batches and runs for the benchmarks.

They stay in the folder of the benchmark, where the next run uses them again.
"""

import hashlib
import pathlib
import shutil
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np
import pyarrow as pa
import tensorstore as ts
from scipy import ndimage

from synister_jax.base.errors import UserError
from synister_jax.em import volumes
from synister_jax.network import checkpoint, inference
from synister_jax.tables import synapses as synapse_tables
from synister_jax.training import augment, cutting, shards

SMALL_ZYX = (64, 1024, 1024)  # voxels of a volume to predict in
LARGE_ZYX = (64, 2048, 2048)  # voxels of a volume to cut records from
_CHUNK_ZYX = (16, 128, 128)


def texture(
    uri: str | None, at_most_zyx: Sequence[int], at_least_zyx: Sequence[int] = (1, 1, 1)
) -> np.ndarray:
    """Returns a texture, uint8 [z, y, x].

    Args:
      uri: a volume, whose corner is the texture. None makes smooth noise, which can be
        repeated in all directions without visible edges.
      at_most_zyx: the largest shape to read, in voxels.
      at_least_zyx: the smallest shape that is accepted, in voxels.

    Raises:
      UserError: the texture is smaller than `at_least_zyx`.
    """
    if uri:
        source = volumes.open(uri)
        found = source.read((0, 0, 0), np.minimum(source.shape_zyx, at_most_zyx))
    else:
        values = np.random.default_rng(0).standard_normal((32, 512, 512), np.float32)
        smooth = ndimage.gaussian_filter(values, (1, 3, 3), mode="wrap")
        found = np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    if np.less(found.shape, at_least_zyx).any():
        name = f"the texture {uri or 'noise'}, {found.shape},"
        raise UserError(f"{name} is smaller than {tuple(at_least_zyx)}")
    return found


def tiled_volume(
    folder: pathlib.Path,
    uri: str | None,
    shape_zyx: Sequence[int],
    voxel_size_nm_zyx: Sequence[float],
) -> pathlib.Path:
    """Makes an N5 volume (gzip, chunks of 16×128×128) and returns its path.

    The volume repeats the texture in all directions.
    """
    tile = texture(uri, shape_zyx)
    made_of = hashlib.sha256(np.ascontiguousarray(tile))
    made_of.update(repr((tuple(shape_zyx), tuple(voxel_size_nm_zyx))).encode())
    path = folder / f"{made_of.hexdigest()[:12]}.n5"
    if path.exists():
        return path
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # The volume is first made of zeros, which need neither memory nor disk space. The
    # slabs are written afterwards.
    zeros = np.broadcast_to(np.uint8(0), shape_zyx)
    volumes.write_n5(partial, zeros, voxel_size_nm_zyx, chunk_shape_zyx=_CHUNK_ZYX)
    kvstore = {"driver": "file", "path": f"{partial}/"}
    store = ts.open({"driver": "n5", "kvstore": kvstore}).result().T
    rows, columns = (np.arange(shape_zyx[a]) % tile.shape[a] for a in (1, 2))
    for z in range(0, shape_zyx[0], _CHUNK_ZYX[0]):
        sections = np.arange(z, min(z + _CHUNK_ZYX[0], shape_zyx[0]))
        slab = tile[np.ix_(sections % tile.shape[0], rows, columns)]
        store[z : z + len(slab)].write(slab).result()
    return partial.rename(path)


def random_starts(
    volume_zyx: Sequence[int], crop_zyx: Sequence[int], count: int
) -> np.ndarray:
    """Returns random starts [count, 3] in voxels of crops inside the volume.

    Raises:
      UserError: the volume is smaller than a crop.
    """
    most = np.subtract(volume_zyx, crop_zyx)
    if min(most) < 0:
        raise UserError(f"a volume of {volume_zyx} is smaller than {crop_zyx}")
    return np.random.default_rng(0).integers(0, most, (count, 3), endpoint=True)


def synapses(
    volume: volumes.Volume, config: ml_collections.ConfigDict, count: int
) -> pa.Table:
    """Returns random train synapses whose records are inside the volume."""
    record = record_shape_zyx(config)
    starts = random_starts(volume.shape_zyx, record, count)
    centres_nm = (starts + np.asarray(record) // 2) * volume.voxel_size_nm_zyx
    columns = dict(zip(synapse_tables.POSITION, centres_nm.T, strict=True))
    columns |= {"synapse_id": np.arange(count), "neuron_id": np.arange(count)}
    columns["neurotransmitter"] = np.resize(config.classes, count)
    columns[f"split_{config.split}"] = np.full(count, "train")
    return synapse_tables.conform(pa.table(columns), "random synapses")


def margin_vx_zyx(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Returns the margin that the augmentation needs around a crop."""
    return augment.AugmentSettings.of(config).margin_vx_zyx


def record_shape_zyx(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Returns the shape of a record of a shard: a crop with its margin."""
    shape = shards.record_shape_zyx(config.crop_shape_zyx, margin_vx_zyx(config))
    return tuple(map(int, shape))


def cut_shards(
    folder: pathlib.Path,
    table: pa.Table,
    volume: volumes.Volume,
    config: ml_collections.ConfigDict,
) -> shards.Shards:
    """Cuts the records of the synapses into shards, unless the shards exist already."""
    return cutting.write(
        folder,
        table,
        volume,
        crop_shape_zyx=config.crop_shape_zyx,
        margin_vx_zyx=margin_vx_zyx(config),
        classes=config.classes,
    )


def batch(config: ml_collections.ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 records of random voxels, and labels; every call gives the same."""
    shape = (config.batch_size, *record_shape_zyx(config))
    voxels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.arange(config.batch_size, dtype=np.int32) % len(config.classes)
    return voxels, labels


def unaugmented(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config with all augmentations off, so that records have no margin."""
    plain = config.copy_and_resolve_references()
    plain.augment.update(jitter_zyx=(0, 0, 0), elastic_sigma_zyx=(0.0, 0.0, 0.0))
    plain.augment.update(rotation=(0.0, 0.0), slip_probability=0.0)
    plain.augment.update(shift_probability=0.0, mirror=False, transpose_axes=())
    plain.augment.update(intensity_scale=(1.0, 1.0), intensity_shift=(0.0, 0.0))
    return plain


def run(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    name: str,
    make: Callable[[], inference.Variables],
) -> pathlib.Path:
    """Returns the folder of a run; `make` makes its weights if there is no run."""
    digest = hashlib.sha256(config.to_json_best_effort().encode()).hexdigest()
    path = folder / f"{name}-{digest[:12]}"
    if not checkpoint.steps(path):
        checkpoint.save_imported(path, 0, make(), config)
    return path
