# SPDX-License-Identifier: Apache-2.0
"""The published network, with no brain region in two parts of the split.

    python tools/make_splits.py --synapses=fafb.feather --by=brain_region \
        --name=brain_region --output=fafb.feather
    python -m synister_jax.train --config=configs/brain_region.py \
        --workdir=runs/brain_region --config.shards=/data/fafb/shards

The shards of skeleton.py serve: the same tools/shard_crops.py command, run again, takes
the new split into their index and cuts nothing. Hardware: as skeleton.py. A neuron of
several regions is in several parts of this split. Not run with this code.
"""

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.split = "brain_region"
    return config
