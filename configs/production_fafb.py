# SPDX-License-Identifier: Apache-2.0
"""The published production network of FAFB, trained as one would today. Not run.

    python -m synister_jax.train --config=configs/production_fafb.py \
        --workdir=runs/production_fafb --config.shards=/data/fafb/shards

Network as the original's production model (synistereq/models: fmaps 16); 437.1 M
parameters. That one was trained as skeleton.py says, for 475,000 steps of 8 crops, 3.8
million; here it is 6.4 million in 100,000 steps. The numbers of the recipe are usual
ones, not tuned: nobody has measured yet that they are better.

Hardware: 8 GPUs of 40 GB, or as many TPU cores; any number of devices that divides 64
gets the same batches. Parameters, moments and average take 7 GB on each, gradients
1.7 GB; --config.head_devices=4 leaves a quarter of both. Expected: skeleton.py's 87 %
per synapse or better; not run with this code.

For predictions alone, when no test part is needed: make a split with
--fractions=0.8,0.2,0 --name=skeleton_no_test, and add --config.split=skeleton_no_test.
"""

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.model.features = 16

    # The published rate for 8 crops, times √8: Adam's steps do not grow with the batch.
    config.learning_rate = 2.8e-4
    config.warmup_steps = 2_000
    config.schedule = "cosine"
    config.weight_decay = 0.01
    config.clip_norm = 1.0
    config.ema_decay = 0.9995  # over the last 2,000 steps
    config.label_smoothing = 0.05  # synapses have the label of their neuron

    config.batch_size = 64
    config.compute_dtype = "bfloat16"
    config.num_train_steps = 100_000

    config.eval_every_steps = 5_000
    config.snapshot_every_steps = 5_000
    config.keep_every_steps = 25_000
    return config
