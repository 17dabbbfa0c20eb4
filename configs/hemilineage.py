# SPDX-License-Identifier: Apache-2.0
r"""Trains the published network on a split without shared hemilineages.

No hemilineage is in two parts of the split.

    python tools/make_splits.py --synapses=fafb.feather --by=hemilineage \
        --name=hemilineage --output=fafb.feather
    python -m synister_jax.train --config=configs/hemilineage.py \
        --workdir=runs/hemilineage --config.shards=/data/fafb/shards

The shards of skeleton.py can be used. Run their tools/shard_crops.py command again: the
command adds the new split to the index and cuts no crops.

Hardware: the same as for skeleton.py. Expected: the test is stricter than with
skeleton.py, because no tested neuron has a sister neuron in training. This
configuration has not been run with this code.
"""

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.split = "hemilineage"
    return config
