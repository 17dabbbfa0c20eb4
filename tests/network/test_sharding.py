# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import pytest

from synister_jax.base.errors import UserError
from synister_jax.network import sharding


def test_mesh_covers_all_devices_and_splits_the_batch() -> None:
    mesh = sharding.make_mesh()
    assert mesh.size == len(jax.devices()) == 4
    batch = jax.device_put(jax.numpy.zeros((8, 3)), sharding.batch(mesh))
    assert [shard.data.shape for shard in batch.addressable_shards] == [(2, 3)] * 4
    whole = jax.device_put(jax.numpy.zeros((8, 3)), sharding.replicated(mesh))
    assert [shard.data.shape for shard in whole.addressable_shards] == [(8, 3)] * 4


def test_batch_that_does_not_divide() -> None:
    sharding.require_divisible(8, sharding.make_mesh())
    with pytest.raises(UserError, match="batch size 9 .* 4 devices; make it 8"):
        sharding.require_divisible(9, sharding.make_mesh())


def test_groups_share_the_matrices_of_the_head() -> None:
    mesh = sharding.make_mesh(head_devices=2)
    assert dict(mesh.shape) == {"data": 2, "model": 2}
    tree = {
        "convolution": jnp.zeros((3, 3, 3, 2, 4)),
        "dense": jnp.zeros((6, 8)),
        "logits": jnp.zeros((8, 3)),  # 3 classes cannot be divided by 2
        "bias": jnp.zeros(8),
    }
    placed = sharding.shardings(sharding.abstract_state(tree, mesh))
    placed = jax.device_put(tree, placed)
    parts = {
        name: array.addressable_shards[0].data.shape for name, array in placed.items()
    }
    assert parts == {
        "convolution": (3, 3, 3, 2, 4),
        "dense": (6, 4),
        "logits": (8, 3),
        "bias": (8,),
    }
    batch = jax.device_put(jnp.zeros((8, 3)), sharding.batch(mesh))
    assert batch.addressable_shards[0].data.shape == (2, 3)
    gathered = jax.device_put(batch, sharding.head_input(mesh))
    assert gathered.addressable_shards[0].data.shape == (4, 3)
    with pytest.raises(UserError, match="head_devices = 3 does not divide the 4 dev"):
        sharding.make_mesh(head_devices=3)


def test_a_process_provides_the_places_of_its_devices() -> None:
    for heads in (1, 2, 4):
        batch = sharding.batch(sharding.make_mesh(head_devices=heads))
        assert sharding.local_places(batch, 8).tolist() == list(range(8))


def test_parts_of_an_accumulated_batch_must_divide_too() -> None:
    with pytest.raises(UserError, match="12 .* 4 devices × 2 parts; make it 8"):
        sharding.require_divisible(12, sharding.make_mesh(), accumulate_steps=2)


def test_processes_that_are_not_all_named() -> None:
    with pytest.raises(UserError, match="--coordinator=nonsense: give host:port"):
        sharding.join_processes("nonsense", 2, 0)
    for processes, index in ((None, 0), (2, None), (2, 2)):
        with pytest.raises(UserError, match=f"--processes={processes} --process_in"):
            sharding.join_processes("localhost:1234", processes, index)
