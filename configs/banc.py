# SPDX-License-Identifier: Apache-2.0
"""BANC (ssTEM, 45 × 4 × 4 nm): the ResNet-18 of synister_banc, eight transmitters.

    python tools/import_synapses.py --source=banc --input=banc.feather \
        --output=synapses.feather
    python tools/make_splits.py --synapses=synapses.feather --by=neuron --name=neuron \
        --balance=neurons --shared_cell_types --output=synapses.feather \
        --crop_shape_zyx=14,160,160 --voxel_size_nm_zyx=45,4,4
    python -m synister_jax.train --config=configs/banc.py --workdir=runs/banc \
        --config.shards=/data/banc/shards

Hardware: parameters and Adam moments take 0.4 GB; any GPU or TPU with 16 GB. Its
authors' held-out part was watched during training and shares cell types with it. Not
run with this code.

From the original: network, loss, optimiser, batch, crop, jitter; of its augmentation
rotation by ±90° and flips (here along z too). Not from it, on purpose:

- rotation by ±180°, more scaling and more noise for rare transmitters: where strength
  depends on the class, the traces of resampling and padding give the label away;
- noise of at most 0.05 grey levels: it changes nothing;
- scaling, translation beyond the jitter, gamma: not in this chain.

The rest is FAFB's chain in voxels. The original computes in mixed precision (float16);
here --config.compute_dtype=bfloat16 does.
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
    config.num_train_steps = 1_020_000  # the checkpoint that its example chooses
    return config
