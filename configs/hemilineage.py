# SPDX-License-Identifier: Apache-2.0
"""The published network, with no hemilineage in two parts of the split.

    python tools/make_splits.py --synapses=fafb.feather --by=hemilineage \
        --name=hemilineage --output=fafb.feather
    python -m synister_jax.train --config=configs/hemilineage.py \
        --workdir=runs/hemilineage --config.shards=/data/fafb/shards

The shards of skeleton.py serve: the same tools/shard_crops.py command, run again, takes
the new split into their index and cuts nothing. Hardware: as skeleton.py. Expected: a
stricter test than skeleton.py's, of neurons without a sister in training; not run with
this code.
"""

import ml_collections

from configs import skeleton


def get_config() -> ml_collections.ConfigDict:
    config = skeleton.get_config()
    config.split = "hemilineage"
    return config
