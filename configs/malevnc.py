# SPDX-License-Identifier: Apache-2.0
"""Male nerve cord (FIB-SEM, isotropic 8 nm): 80³ voxels, three transmitters, neither.

    python tools/import_synapses.py --source=malevnc \
        --input=acetylcholine.csv.gz,gaba.csv.gz,glutamate.csv.gz \
        --output=malevnc.feather
    python tools/make_splits.py --synapses=malevnc.feather --by=neuron --name=skeleton \
        --output=malevnc.feather --crop_shape_zyx=80,80,80 --voxel_size_nm_zyx=8,8,8
    python -m synister_jax.train --config=configs/malevnc.py --workdir=runs/malevnc \
        --config.shards=/data/malevnc/shards

Network as the original's production model (synistereq/models: fmaps 16, four classes);
83.2 M parameters. Hardware: parameters and Adam moments take 1 GB; any GPU or TPU with
16 GB. Expected: no accuracy is published (ground truth: Takemura et al. 2024, 187
neurons); not run with this code.
"""

import ml_collections

from configs import hemibrain


def get_config() -> ml_collections.ConfigDict:
    config = hemibrain.get_config()
    config.classes = ("gaba", "acetylcholine", "glutamate", "neither")
    # About the size of a class: 21,606 T-bars of gaba, 10,869 of glutamate.
    config.neither_crops = 20_000
    config.model.features = 16
    config.model.convolutions = (2, 2, 2, 2)
    return config
