# SPDX-License-Identifier: Apache-2.0
r"""Trains the published network for FAFB, with six transmitters.

No neuron is in two parts of the split.

    python -m synister_jax.train --config=configs/skeleton.py --workdir=runs/skeleton \
        --config.shards=/data/fafb/shards

Hardware: any GPU or TPU with 16 GB. Parameters and Adam moments take 4 GB, and a batch
of 8 takes about 3 GB more. Expected: the publication reports an accuracy of 87 % per
synapse and 94 % per neuron on the test part (Eckstein et al. 2024, Cell 187). This code
has not been trained on FAFB yet.

The network, the optimiser, the sampling and the augmentation follow the original's
train_pipeline.py and the train_config.ini in its README. Options that are off here are
not part of the original.
"""

import math

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
    config.neither_crops = 0  # random crops, for an extra last class `neither`
    config.unknown_per_class = 0  # displaced synapses, for a class `unknown`
    config.balance_clusters = True  # draw a synapse of a cluster of n with chance 1/n
    config.crop_shape_zyx = (16, 160, 160)  # 640 nm in every direction
    config.voxel_size_nm_zyx = (40, 4, 4)

    config.init_from = config_dict.placeholder(str)  # workdir of a run to fine-tune

    config.model = model = ml_collections.ConfigDict()
    model.network = "vgg3d"  # or resnet18
    model.features = 12  # number of features in the first level
    model.feature_multipliers = (2, 2, 2, 2)  # factor from each level to the next
    model.downsample_factors = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    model.convolutions = (2, 2, 2, 2)  # number in each level
    model.dense_features = 4096  # size of both hidden layers of the head
    model.dropout = 0.5

    config.augment = augment = ml_collections.ConfigDict()
    augment.sizes_in = "voxels"  # or nm
    # The synapse stays in the central 1/8 of each axis.
    augment.jitter_zyx = (1, 10, 10)
    augment.elastic_spacing_zyx = (4, 40, 40)  # distance of the control points
    augment.elastic_sigma_zyx = (0.0, 2.0, 2.0)  # of the displacements of the points
    augment.elastic_subsample = 8  # cubic at every 8th voxel, linear between
    augment.rotation = (0.0, math.pi / 2)  # in the section plane, in radians
    augment.warp_probability = 1.0  # that a crop is warped and rotated, and so smoothed
    augment.slip_probability = 0.05  # that a section is displaced alone
    augment.shift_probability = 0.05  # that a section and all after it are displaced
    augment.max_misalign_yx = (10, 10)  # largest displacement of a section
    augment.mirror = True  # along every axis, also z
    augment.transpose_axes = (1, 2)  # exchanges y and x
    augment.intensity_scale = (0.9, 1.1)  # factor around the mean
    augment.intensity_shift = (-0.1, 0.1)  # added, as a fraction of the grey range
    augment.intensity_per_section = True  # draws scale and shift for each section

    config.learning_rate = 1e-4  # Adam
    config.warmup_steps = 0  # the rate rises linearly over these steps
    config.schedule = "constant"  # or cosine, which falls to 0 at num_train_steps
    config.weight_decay = 0.0  # above 0, AdamW is used
    config.clip_norm = 0.0  # largest norm of all gradients together; 0 is off
    config.ema_decay = 0.0  # above 0, averaged parameters are evaluated; 0 is off
    config.label_smoothing = 0.0
    config.focal_gamma = 0.0
    config.class_weights = ()  # of the loss, in the order of classes; () is all 1

    config.batch_size = 8  # number of crops over all devices together
    config.accumulate_steps = 1  # a batch is computed in this many parts
    config.head_devices = 1  # this many devices share the dense head
    config.compute_dtype = "float32"  # or bfloat16; parameters stay float32
    config.num_train_steps = 500_000
    config.early_stop_evals = 0  # stop after this many evaluations without a gain
    config.seed = 0

    config.log_every_steps = 100
    config.eval_every_steps = 10_000  # evaluates the whole validation part
    config.checkpoint_every_steps = 1_000
    config.snapshot_every_steps = 10_000  # saves pictures of augmented crops
    config.keep_latest = 2  # checkpoints of 4 GB each
    config.keep_every_steps = 50_000  # checkpoints of these steps are not deleted
    return config
