# SPDX-License-Identifier: Apache-2.0
r"""Trains the ResNet-18 of synister_banc for BANC (ssTEM), with eight transmitters.

A voxel has 45 × 4 × 4 nm.

    python tools/import_synapses.py --source=banc --input=banc.feather \
        --output=synapses.feather
    python tools/make_splits.py --synapses=synapses.feather --by=neuron --name=neuron \
        --balance=neurons --shared_cell_types --output=synapses.feather \
        --crop_shape_zyx=14,160,160 --voxel_size_nm_zyx=45,4,4
    python -m synister_jax.train --config=configs/banc.py --workdir=runs/banc \
        --config.shards=/data/banc/shards

Hardware: any GPU or TPU with 16 GB; parameters and Adam moments take 0.4 GB. Expected:
this configuration has not been run with this code. The authors of BANC watched their
held-out part during training, and the held-out part shares cell types with the training
part.

The network, the loss, the optimiser, the batch, the crop and the jitter are those of
the original. Rotation by ±90° and flips also come from the original; flips here are
also along z. These steps of the original are left out on purpose:

- Rotation by ±180°, more scaling and more noise for rare transmitters. If the strength
  depends on the class, the traces of resampling and padding show the label.
- Noise of at most 0.05 grey levels, because this noise changes nothing.
- Scaling, translation beyond the jitter, and gamma. This project has no such steps.

All other augmentation is that of FAFB, with equal sizes in voxels. The original
computes in mixed precision (float16). Here --config.compute_dtype=bfloat16 does this.
"""

import math

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.split = "neuron"
    config.classes = (
        "acetylcholine",
        "dopamine",
        "gaba",
        "glutamate",
        "histamine",
        "octopamine",
        "serotonin",
        "tyramine",
    )
    config.balance_clusters = False
    config.crop_shape_zyx = (14, 160, 160)  # 630 × 640 × 640 nm
    config.voxel_size_nm_zyx = (45, 4, 4)

    config.model = ml_collections.ConfigDict({"network": "resnet18"})

    config.augment.jitter_zyx = (1, 10, 10)
    config.augment.rotation = (-math.pi / 2, math.pi / 2)

    config.learning_rate = 1e-4
    config.weight_decay = 1e-3
    config.focal_gamma = 2.0
    config.class_weights = (1.0, 1.1, 1.0, 1.0, 0.9, 1.0, 1.1, 1.0)

    config.batch_size = 16
    config.num_train_steps = 1_020_000  # step of the checkpoint in BANC's example
    return config
