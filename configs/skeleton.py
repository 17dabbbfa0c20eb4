# SPDX-License-Identifier: Apache-2.0
"""The published network: FAFB, six transmitters, no neuron in two parts of the split.

    python -m synister_jax.train --config=configs/skeleton.py --workdir=runs/skeleton \
        --config.shards=/data/fafb/shards

Hardware: parameters and Adam moments take 4 GB, a batch of 8 about 3 GB more; any
GPU or TPU with 16 GB. Expected: the publication reports 87 % per synapse and 94 % per
neuron on the test part (Eckstein et al. 2024, Cell 187); this code has not been
trained on FAFB yet. Network, optimiser and augmentation follow the original's
train_pipeline.py and its README's train_config.ini, except for the elastic warp and
the section shift, which are still to come.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.shards = config_dict.placeholder(str)  # folder from tools/shard_crops.py
    config.split = "skeleton"
    config.classes = (  # the order of the network's outputs
        "gaba",
        "acetylcholine",
        "glutamate",
        "serotonin",
        "octopamine",
        "dopamine",
    )
    config.crop_shape_zyx = (16, 160, 160)  # 640 nm in every direction
    config.voxel_size_nm_zyx = (40, 4, 4)

    config.model = model = ml_collections.ConfigDict()
    model.features = 12  # of the first level
    model.feature_multipliers = (2, 2, 2, 2)  # from each level to the next
    model.downsample_factors = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    model.convolutions = (2, 2, 2, 2)  # of each level
    model.dense_features = 4096  # of both hidden layers of the head
    model.dropout = 0.5

    config.augment = augment = ml_collections.ConfigDict()
    augment.jitter_vx_zyx = (1, 10, 10)  # the original's central 1/8 of the field
    augment.mirror = True  # every axis, z too
    augment.transpose = True  # y with x
    augment.intensity_scale = (0.9, 1.1)  # about the section's mean
    augment.intensity_shift = (-0.1, 0.1)

    config.learning_rate = 1e-4  # Adam
    config.cosine_decay = False  # to 0 at num_train_steps
    config.batch_size = 8  # over all devices
    config.num_train_steps = 500_000
    config.seed = 0

    config.log_every_steps = 100
    config.eval_every_steps = 10_000  # on the whole validation part
    config.checkpoint_every_steps = 1_000
    config.keep_latest = 2  # of 4 GB each
    config.keep_every_steps = 50_000
    return config
