# SPDX-License-Identifier: Apache-2.0
r"""Trains the published network on a split without shared brain regions.

No brain region is in two parts of the split.

    python tools/make_splits.py --synapses=fafb.feather --by=brain_region \
        --name=brain_region --output=fafb.feather
    python -m synister_jax.train --config=configs/brain_region.py \
        --workdir=runs/brain_region --config.shards=/data/fafb/shards

The shards of skeleton.py can be used. Run their tools/shard_crops.py command again: the
command adds the new split to the index and cuts no crops.

Hardware: the same as for skeleton.py. Expected: this configuration has not been run
with this code. If a neuron has synapses in several regions, the neuron can be in
several parts of this split.
"""

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.split = "brain_region"
    return config
