# SPDX-License-Identifier: Apache-2.0
"""Random volumes, synapses and networks to time training and predictions with.

What is made stays in the benchmark's folder and is found there by the next run.
"""

import hashlib
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pyarrow as pa
import textures

from synister_jax import train
from synister_jax.base.errors import UserError
from synister_jax.em import volumes
from synister_jax.network import checkpoint, inference, model
from synister_jax.tables import synapses as synapse_tables
from synister_jax.training import augment, shards


def volume_path(
    folder: pathlib.Path, shape: Sequence[int], config: ml_collections.ConfigDict
) -> pathlib.Path:
    """An N5 volume (gzip, chunks of 16×128×128) of smooth noise."""
    noise = textures.load(None, shape, (1, 1, 1))
    return textures.tiled(folder, noise, tuple(shape), tuple(config.voxel_size_nm_zyx))


def synapses(
    volume: volumes.Volume, config: ml_collections.ConfigDict, count: int
) -> pa.RecordBatch:
    """Uniformly random ones whose crops lie inside."""
    rng = np.random.default_rng(0)
    most = np.subtract(volume.shape_zyx, config.crop_shape_zyx)
    starts = rng.integers(0, most, (count, 3), endpoint=True)
    centres = starts + np.asarray(config.crop_shape_zyx) // 2
    z, y, x = (centres * volume.voxel_size_nm_zyx + volume.offset_nm_zyx).T
    ids = np.arange(len(starts))
    names = ["synapse_id", "z_nm", "y_nm", "x_nm"]
    return pa.RecordBatch.from_arrays(list(map(pa.array, (ids, z, y, x))), names)


def training_synapses(
    volume: volumes.Volume, config: ml_collections.ConfigDict, count: int
) -> pa.Table:
    """Uniformly random ones whose records lie inside, all in the train part."""
    record = record_shape_zyx(config)
    most = np.subtract(volume.shape_zyx, record)
    if min(most) < 0:
        raise UserError(f"--volume_shape_zyx is smaller than a record, {record}")
    starts = np.random.default_rng(0).integers(0, most, (count, 3), endpoint=True)
    centres_nm = (starts + np.asarray(record) // 2) * volume.voxel_size_nm_zyx
    columns = dict(zip(synapse_tables.POSITION, centres_nm.T, strict=True))
    columns |= {"synapse_id": np.arange(count), "neuron_id": np.arange(count)}
    columns["neurotransmitter"] = np.resize(config.classes, count)
    columns[f"split_{config.split}"] = np.full(count, "train")
    return synapse_tables.conform(pa.table(columns), "random synapses")


def record_shape_zyx(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Of a shard's records: a crop and the margin for its augmentation."""
    margin = augment.Settings.of(config).margin_vx_zyx
    return tuple(map(int, shards.record_shape_zyx(config.crop_shape_zyx, margin)))


def unaugmented(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with every augmentation off."""
    plain = config.copy_and_resolve_references()
    plain.augment.update(
        jitter_zyx=(0, 0, 0),
        elastic_sigma_zyx=(0.0, 0.0, 0.0),
        rotation=(0.0, 0.0),
        slip_probability=0.0,
        shift_probability=0.0,
        mirror=False,
        transpose_axes=(),
        intensity_scale=(1.0, 1.0),
        intensity_shift=(0.0, 0.0),
    )
    return plain


def training_state(
    config: ml_collections.ConfigDict,
    tx: optax.GradientTransformation,
    where: jax.sharding.Sharding,
) -> train.TrainState:
    """The state that training starts with."""
    init = jax.jit(
        lambda key: train.create_state(key, config, tx),
        out_shardings=where,
        compiler_options={"xla_backend_optimization_level": 1},  # it runs once
    )
    return init(jax.random.key(0))


def workdir(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    name: str = "run",
    make: Callable[[], inference.Variables] | None = None,
) -> pathlib.Path:
    """A run of this configuration with weights that nobody trained.

    Args:
      name: of the weights.
      make: returns them; else they are those that training starts with.
    """
    digest = hashlib.sha256(config.to_json_best_effort().encode()).hexdigest()
    path = folder / f"{name}-{digest[:12]}"
    if not checkpoint.steps(path):
        variables = make() if make else _initial(config)
        checkpoint.save_imported(path, 0, variables, config)
    return path


def _initial(config: ml_collections.ConfigDict) -> inference.Variables:
    crops = jnp.zeros((1, *config.crop_shape_zyx), jnp.float32)
    network = model.from_config(config)
    init = jax.jit(
        lambda key: network.init(key, crops, train=False),
        compiler_options={"xla_backend_optimization_level": 1},
    )
    return init(jax.random.key(0))
