# SPDX-License-Identifier: Apache-2.0
"""Hemibrain (FIB-SEM, isotropic 8 nm): 80³ voxels, 640 nm in every direction.

    python -m synister_jax.train --config=configs/hemibrain.py \
        --workdir=runs/hemibrain --config.shards=/data/hemibrain/shards

Network as the original's production model (synistereq/models: fmaps 24, four
convolutions in the first level); 117 M parameters. Not trained with this code yet.
"""

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.crop_shape_zyx = (80, 80, 80)
    config.voxel_size_nm_zyx = (8, 8, 8)
    config.model.features = 24
    config.model.downsample_factors = ((2, 2, 2),) * 4
    config.model.convolutions = (4, 2, 2, 2)
    config.augment.jitter_vx_zyx = (5, 5, 5)
    return config
