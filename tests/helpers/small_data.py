# SPDX-License-Identifier: Apache-2.0
"""A small data set, its configuration, and the folders of real data."""

import os
import pathlib

import ml_collections
import numpy as np
import pyarrow as pa
import pytest

from configs import skeleton
from synister_jax.em import volumes
from synister_jax.training import cutting, shards

ROOT = pathlib.Path(__file__).parents[2]  # the checkout
CLASSES = ("gaba", "acetylcholine", "dopamine")
VOXEL_SIZE_NM_ZYX = (40.0, 4.0, 4.0)


def shared_data(name: str) -> pathlib.Path:
    """Returns a folder of real data. Skips the test if there is no such folder."""
    default = ROOT.parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("SYNISTER_SHARED_DATA", default)) / name
    if not folder.exists():
        pytest.skip(f"real data {name} is not there; set SYNISTER_SHARED_DATA")
    return folder


def tiny_config() -> ml_collections.ConfigDict:
    """Returns the published configuration, made small enough for a test to train."""
    config = skeleton.get_config()
    config.classes = CLASSES
    config.crop_shape_zyx = (4, 16, 16)
    config.voxel_size_nm_zyx = VOXEL_SIZE_NM_ZYX
    config.model.features = 2
    config.model.feature_multipliers = (2, 2)
    config.model.downsample_factors = ((1, 2, 2), (2, 2, 2))
    config.model.convolutions = (1, 1)
    config.model.dense_features = 16
    config.augment.jitter_zyx = (1, 2, 2)
    config.augment.elastic_sigma_zyx = (0.0, 0.0, 0.0)
    config.augment.rotation = (0.0, 0.0)
    config.augment.max_misalign_yx = (0, 0)
    config.balance_clusters = False
    config.learning_rate = 1e-2
    config.batch_size = 12
    config.num_train_steps = 6
    config.log_every_steps = 1
    config.eval_every_steps = 3
    config.checkpoint_every_steps = 3
    config.snapshot_every_steps = 1_000
    config.keep_latest = 3
    config.keep_every_steps = 1_000
    return config


def synapse_rows() -> pa.Table:
    """Returns 90 synapses of 18 neurons; every tenth has no known neurotransmitter."""
    rng = np.random.default_rng(1)
    count = 90
    cells = rng.permutation(5 * 9 * 9)[:count]
    z, y, x = np.unravel_index(cells, (5, 9, 9))
    neuron = np.arange(count) % 18
    neurotransmitter = [CLASSES[n % 3] for n in neuron]
    part = np.select([neuron < 9, neuron < 12], ["train", "validation"], "test")
    unknown = np.arange(count) % 10 == 9
    columns = {
        "synapse_id": 7_000_000_000_000 + np.arange(count) * 3,
        "z_nm": (z * 4 + 4) * 40.0,
        "y_nm": (y * 16 + 16) * 4.0,
        "x_nm": (x * 16 + 16) * 4.0,
        "neuron_id": 720_575_940_600_000_000 + neuron,
        "neurotransmitter": pa.array(neurotransmitter, mask=unknown),
        "hemilineage": pa.array([f"H{n % 6}" for n in neuron]),
        "brain_region": pa.array(["AL", "MB"] * (count // 2)),
        "cell_type": pa.nulls(count, pa.string()),
        "split_skeleton": pa.array(part, mask=unknown),
    }
    return pa.table(columns)


def write_shards(
    folder: pathlib.Path,
    volume_path: pathlib.Path,
    table: pa.Table,
    margin_vx_zyx: tuple[int, ...] = (1, 2, 2),
) -> shards.Shards:
    return cutting.write(
        folder,
        table,
        volumes.open(str(volume_path)),
        crop_shape_zyx=(4, 16, 16),
        margin_vx_zyx=margin_vx_zyx,
        classes=CLASSES,
        shard_bytes=20 * 6 * 20 * 20,
    )
