# SPDX-License-Identifier: Apache-2.0
r"""Trains the published production network of FAFB with a current training recipe.

    python -m synister_jax.train --config=configs/production_fafb.py \
        --workdir=runs/production_fafb --config.shards=/data/fafb/shards

The network is the original's production model (synistereq/models: fmaps 16). It has
437.1 M parameters. The original was trained with the recipe of skeleton.py, for 475,000
steps of 8 crops, which is 3.8 million crops. Here the network is trained on 6.4 million
crops in 100,000 steps. The numbers of the recipe are usual values and are not tuned.
Nobody has measured yet whether this recipe is better.

Hardware: 8 GPUs of 40 GB, or 8 TPU cores. Any number of devices that divides 64 gets
the same batches. On each device, parameters, moments and average take 7 GB, and
gradients take 1.7 GB. With --config.head_devices=4, both take a quarter of this.
Expected: at least the 87 % per synapse of skeleton.py. This configuration has not been
run with this code.

If the network is only used for predictions, no test part is needed. Then make a split
with --fractions=0.8,0.2,0 --name=skeleton_no_test, and add
--config.split=skeleton_no_test.
"""

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.model.features = 16

    # This is the published rate for 8 crops, times √8, because the batch is 8 times as
    # large and the steps of Adam do not grow with the batch.
    config.learning_rate = 2.8e-4
    config.warmup_steps = 2_000
    config.schedule = "cosine"
    config.weight_decay = 0.01
    config.clip_norm = 1.0
    config.ema_decay = 0.9995  # averages about the last 2,000 steps
    config.label_smoothing = 0.05  # labels are of neurons, not of synapses

    config.batch_size = 64
    config.compute_dtype = "bfloat16"
    config.num_train_steps = 100_000

    config.eval_every_steps = 5_000
    config.snapshot_every_steps = 5_000
    config.keep_every_steps = 25_000
    return config
