# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a small relative of the published network, for two CPU cores.

    make demo

Three to four minutes of training. Expected on the generated volume (make_demo, seed
0): 0.87 per synapse and all 21 neurons of the test part; see README.md.
"""

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.crop_shape_zyx = (8, 48, 48)  # 320 × 192 × 192 nm

    config.model.features = 8
    config.model.downsample_factors = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    config.model.convolutions = (1, 1, 1, 1)
    config.model.dense_features = 128
    config.model.dropout = 0.0  # it sees each crop a few times only

    config.augment.jitter_zyx = (0, 3, 3)
    config.augment.elastic_spacing_zyx = (4, 12, 12)  # as many as the published crop
    config.augment.elastic_sigma_zyx = (0.0, 0.6, 0.6)
    config.augment.max_misalign_yx = (3, 3)
    # Interpolation smooths noise, and predicted crops are not interpolated. Trained on
    # warped crops alone, this network had 0.82 of warped ones right, 0.57 of others.
    config.augment.warp_probability = 0.5
    config.balance_clusters = False

    config.learning_rate = 1e-3
    config.schedule = "cosine"  # a short run has no time to settle otherwise
    config.batch_size = 16
    config.num_train_steps = 900

    config.log_every_steps = 10
    config.eval_every_steps = 180
    config.checkpoint_every_steps = 180
    config.snapshot_every_steps = 500
    config.keep_latest = 3
    config.keep_every_steps = 1_000
    return config
