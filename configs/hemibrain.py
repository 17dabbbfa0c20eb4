# SPDX-License-Identifier: Apache-2.0
r"""Trains the network for the hemibrain (FIB-SEM with isotropic voxels of 8 nm).

A crop has 80³ voxels, which is 640 nm in every direction.

    python -m synister_jax.train --config=configs/hemibrain.py \
        --workdir=runs/hemibrain --config.shards=/data/hemibrain/shards

The network is the original's production model (synistereq/models: fmaps 24, four
convolutions in the first level). It has 117 M parameters.

Hardware: any GPU or TPU with 16 GB; parameters and Adam moments take 1.4 GB. Expected:
this configuration has not been run with this code.
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
    augment_isotropic(config.augment)
    return config


def augment_isotropic(augment: ml_collections.ConfigDict) -> None:
    """Sets the published sizes in nm, with equal sizes in every direction.

    The original used the numbers of voxels of FAFB for the hemibrain too. FIB-SEM has
    no sections that can slip or differ in brightness, and z does not differ from y and
    x.
    """
    augment.sizes_in = "nm"
    augment.jitter_zyx = (40, 40, 40)
    augment.elastic_spacing_zyx = (160, 160, 160)
    augment.elastic_sigma_zyx = (8.0, 8.0, 8.0)
    augment.slip_probability = 0.0
    augment.shift_probability = 0.0
    augment.transpose_axes = (0, 1, 2)
    augment.intensity_per_section = False
