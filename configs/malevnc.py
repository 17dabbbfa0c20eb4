# SPDX-License-Identifier: Apache-2.0
r"""Trains the network for the male nerve cord (FIB-SEM with isotropic voxels of 8 nm).

The classes are three transmitters and `neither`. A crop has 80³ voxels.

    python tools/import_synapses.py --source=malevnc \
        --input=acetylcholine.csv.gz,gaba.csv.gz,glutamate.csv.gz \
        --output=malevnc.feather
    python tools/make_splits.py --synapses=malevnc.feather --by=neuron --name=skeleton \
        --output=malevnc.feather --crop_shape_zyx=80,80,80 --voxel_size_nm_zyx=8,8,8
    python -m synister_jax.train --config=configs/malevnc.py --workdir=runs/malevnc \
        --config.shards=/data/malevnc/shards

The network is the original's production model (synistereq/models: fmaps 16, four
classes). It has 83.2 M parameters.

Hardware: any GPU or TPU with 16 GB; parameters and Adam moments take 1 GB. Expected: no
accuracy is published, and this configuration has not been run with this code. The
ground truth has 187 neurons (Takemura et al. 2024).
"""

import ml_collections

from configs import hemibrain


def get_config() -> ml_collections.ConfigDict:
    config = hemibrain.get_config()
    config.classes = ("gaba", "acetylcholine", "glutamate", "neither")
    # This is about the size of a class: gaba has 21,606 T-bars, glutamate has 10,869.
    config.neither_crops = 20_000
    config.model.features = 16
    config.model.convolutions = (2, 2, 2, 2)
    return config
