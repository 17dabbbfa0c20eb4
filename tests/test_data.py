# SPDX-License-Identifier: Apache-2.0
import collections
import pathlib

import grain
import jax
import numpy as np
import pytest
from conftest import CLASSES

from synister_jax import data, sharding, shards, synapses
from synister_jax.command import UserError


@pytest.fixture(scope="module")
def opened(shards_folder: pathlib.Path) -> shards.Shards:
    return shards.open(shards_folder)


def batches(
    opened: shards.Shards, seed: int = 0, devices: int = 1
) -> grain.DatasetIterator:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return data.train_batches(opened, "skeleton", 12, seed, sharding.batch(mesh))


def test_classes_are_uniform_and_only_train_examples_appear(
    opened: shards.Shards,
) -> None:
    row_of = {opened.decode(r)[1].tobytes(): i for i, r in enumerate(opened.source())}
    assert len(row_of) == len(opened.index)
    labels = synapses.labels(opened.index, CLASSES)
    seen: collections.Counter[int] = collections.Counter()
    stream = batches(opened)
    for _ in range(20):
        batch = jax.device_get(next(stream))
        assert np.bincount(batch["label"]).tolist() == [4, 4, 4]
        for crop, label in zip(batch["crop"], batch["label"], strict=True):
            row = row_of[crop.tobytes()]
            assert labels[row] == label
            seen[row] += 1
    stream.close()
    in_train = synapses.in_part(opened.index, "skeleton", "train")
    assert set(seen) == set(np.flatnonzero(in_train))
    for label in range(3):
        counts = [n for row, n in seen.items() if labels[row] == label]
        # Epoch by epoch: no example is seen twice before all are seen once.
        assert max(counts) - min(counts) <= 1


def test_same_seed_same_batches_on_any_number_of_devices(opened: shards.Shards) -> None:
    streams = [batches(opened), batches(opened, devices=4), batches(opened, seed=1)]
    first, sharded, other = ([next(s) for _ in range(5)] for s in streams)
    assert len(sharded[0]["crop"].sharding.device_set) == 4
    for a, b in zip(first, sharded, strict=True):
        np.testing.assert_array_equal(a["crop"], b["crop"])
    assert any(
        (a["crop"] != b["crop"]).any() for a, b in zip(first, other, strict=True)
    )
    for stream in streams:
        stream.close()


def test_restored_iterator_goes_on_exactly(opened: shards.Shards) -> None:
    stream, again = batches(opened), batches(opened)
    for _ in range(7):
        next(stream)
    again.set_state(stream.get_state())
    for _ in range(5):
        np.testing.assert_array_equal(next(stream)["crop"], next(again)["crop"])
    stream.close()
    again.close()


@pytest.mark.parametrize("batch_size", [3, 7, 50])
def test_padded_pass_is_exact(opened: shards.Shards, batch_size: int) -> None:
    rows = np.arange(10, 30)
    mesh = sharding.make_mesh(jax.devices()[:1])
    got = [
        np.asarray(batch["crop"])
        for batch in data.padded_batches(opened, rows, batch_size, sharding.batch(mesh))
    ]
    assert all(len(crops) == batch_size for crops in got)
    crops = np.concatenate(got)[: len(rows)]
    source = opened.source()
    for row, crop in zip(rows, crops, strict=True):
        np.testing.assert_array_equal(crop, opened.decode(source[row])[1])


def test_a_class_without_train_examples_is_named(opened: shards.Shards) -> None:
    keep = [n != "dopamine" for n in opened.index["neurotransmitter"].to_pylist()]
    poorer = shards.Shards(opened.folder, opened.manifest, opened.index.filter(keep))
    mesh = sharding.make_mesh(jax.devices()[:1])
    with pytest.raises(UserError, match="no train example of dopamine in split"):
        data.train_batches(poorer, "skeleton", 12, 0, sharding.batch(mesh))
    with pytest.raises(UserError, match="no split 'hemilineage'"):
        data.train_batches(opened, "hemilineage", 12, 0, sharding.batch(mesh))
