# SPDX-License-Identifier: Apache-2.0
"""The published network: FAFB, six transmitters, no neuron in two parts of the split.

    python -m synister_jax.train --config=configs/skeleton.py --workdir=runs/skeleton \
        --config.shards=/data/fafb/shards

Hardware: parameters and Adam moments take 4 GB, a batch of 8 about 3 GB more; any
GPU or TPU with 16 GB. Expected: the publication reports 87 % per synapse and 94 % per
neuron on the test part (Eckstein et al. 2024, Cell 187); this code has not been
trained on FAFB yet. Network, optimiser, sampling and augmentation follow the
original's train_pipeline.py and its README's train_config.ini; all that is off here is
not in it.
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
    config.neither_crops = 0  # random locations, for a last class `neither`
    config.unknown_per_class = 0  # displaced synapses, for a class `unknown`
    config.balance_clusters = True  # 1/n chance for a synapse in a cluster of n
    config.crop_shape_zyx = (16, 160, 160)  # 640 nm in every direction
    config.voxel_size_nm_zyx = (40, 4, 4)

    config.init_from = config_dict.placeholder(str)  # workdir of a run to fine-tune

    config.model = model = ml_collections.ConfigDict()
    model.network = "vgg3d"  # or resnet18
    model.features = 12  # of the first level
    model.feature_multipliers = (2, 2, 2, 2)  # from each level to the next
    model.downsample_factors = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    model.convolutions = (2, 2, 2, 2)  # of each level
    model.dense_features = 4096  # of both hidden layers of the head
    model.dropout = 0.5

    config.augment = augment = ml_collections.ConfigDict()
    augment.sizes_in = "voxels"  # or nm
    augment.jitter_zyx = (1, 10, 10)  # central 1/8 of the field
    augment.elastic_spacing_zyx = (4, 40, 40)  # between control points
    augment.elastic_sigma_zyx = (0.0, 2.0, 2.0)  # of their displacement
    augment.elastic_subsample = 8
    augment.rotation = (0.0, math.pi / 2)  # in the section plane
    augment.warp_probability = 1.0  # of elastic and rotation, which smooth a crop
    augment.slip_probability = 0.05  # one section is displaced
    augment.shift_probability = 0.05  # a section and all after it are
    augment.max_misalign_yx = (10, 10)
    augment.mirror = True  # every axis, z too
    augment.transpose_axes = (1, 2)  # y with x
    augment.intensity_scale = (0.9, 1.1)  # about the mean
    augment.intensity_shift = (-0.1, 0.1)
    augment.intensity_per_section = True

    config.learning_rate = 1e-4  # Adam
    config.warmup_steps = 0  # linear
    config.schedule = "constant"  # or cosine: to 0 at num_train_steps
    config.weight_decay = 0.0  # above 0: AdamW
    config.clip_norm = 0.0  # of all gradients together; 0: none
    config.ema_decay = 0.0  # of averaged parameters, which then are evaluated; 0: none
    config.label_smoothing = 0.0
    config.focal_gamma = 0.0
    config.class_weights = ()  # of the loss, in the order of classes; (): all 1

    config.batch_size = 8  # over all devices
    config.accumulate_steps = 1  # parts of a batch, one after the other
    config.head_devices = 1  # devices that share the dense head
    config.compute_dtype = "float32"  # or bfloat16; parameters stay float32
    config.num_train_steps = 500_000
    config.early_stop_evals = 0  # evaluations without a better one; 0: never
    config.seed = 0

    config.log_every_steps = 100
    config.eval_every_steps = 10_000  # on the whole validation part
    config.checkpoint_every_steps = 1_000
    config.snapshot_every_steps = 10_000  # pictures of augmented crops
    config.keep_latest = 2  # of 4 GB each
    config.keep_every_steps = 50_000
    return config
