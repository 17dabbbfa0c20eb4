# SPDX-License-Identifier: Apache-2.0
import jax
import pytest

from synister_jax import sharding
from synister_jax.command import UserError


def test_mesh_covers_all_devices_and_splits_the_batch() -> None:
    mesh = sharding.make_mesh()
    assert mesh.size == len(jax.devices()) == 4
    batch = jax.device_put(jax.numpy.zeros((8, 3)), sharding.batch(mesh))
    assert [shard.data.shape for shard in batch.addressable_shards] == [(2, 3)] * 4
    whole = jax.device_put(jax.numpy.zeros((8, 3)), sharding.replicated(mesh))
    assert [shard.data.shape for shard in whole.addressable_shards] == [(8, 3)] * 4


def test_batch_that_does_not_divide() -> None:
    sharding.require_divisible(8, sharding.make_mesh())
    with pytest.raises(UserError, match="batch size 9 .* 4 devices; use 8"):
        sharding.require_divisible(9, sharding.make_mesh())
