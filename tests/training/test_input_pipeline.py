# SPDX-License-Identifier: Apache-2.0
import collections
import pathlib

import grain
import jax
import ml_collections
import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base.errors import UserError
from synister_jax.network import sharding
from synister_jax.tables import synapses
from synister_jax.training import input_pipeline, shards
from tests.helpers.small_data import CLASSES, tiny_config


@pytest.fixture(scope="module")
def opened(shards_folder: pathlib.Path) -> shards.Shards:
    return shards.open(shards_folder)


def config(seed: int = 0, balance_clusters: bool = False) -> ml_collections.ConfigDict:
    config = tiny_config()
    config.seed = seed
    config.balance_clusters = balance_clusters
    return config


def stream(
    opened: shards.Shards, seed: int = 0, devices: int = 1, first_step: int = 0
) -> grain.DatasetIterator:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    examples = input_pipeline.TrainBatches.of(opened, config(seed))
    return examples.stream(first_step, sharding.batch(mesh))


def test_classes_are_uniform_and_only_train_examples_appear(
    opened: shards.Shards,
) -> None:
    row_of = {opened.decode(r)[1].tobytes(): i for i, r in enumerate(opened.source())}
    assert len(row_of) == len(opened.index)
    labels = synapses.labels(opened.index, CLASSES)
    seen: collections.Counter[int] = collections.Counter()
    batches = stream(opened)
    for _ in range(20):
        batch = jax.device_get(next(batches))
        assert np.bincount(batch["label"]).tolist() == [4, 4, 4]
        for crop, label in zip(batch["crop"], batch["label"], strict=True):
            row = row_of[crop.tobytes()]
            assert labels[row] == label
            seen[row] += 1
    batches.close()
    in_train = synapses.in_part(opened.index, "skeleton", "train")
    assert set(seen) == set(np.flatnonzero(in_train))
    for label in range(3):
        counts = [n for row, n in seen.items() if labels[row] == label]
        # No example is seen a second time before all are seen once.
        assert max(counts) - min(counts) <= 1


@pytest.mark.long
def test_every_part_of_a_batch_has_every_class_in_the_long_run(
    opened: shards.Shards,
) -> None:
    """Part i of 3 is every third example, and no part always gets the same class."""
    examples = input_pipeline.TrainBatches.of(opened, config())
    counts = np.zeros((3, 3), int)
    for step in range(60):
        labels = examples.labels[examples.rows(step)]
        for part in range(3):
            counts[part] += np.bincount(labels[part::3], minlength=3)
    # The counts are hypergeometric: their mean is 80, their standard deviation about 6.
    assert counts.sum() == 720 and counts.min() > 55 and counts.max() < 105


def test_clustered_synapses_share_one_chance(opened: shards.Shards) -> None:
    """Ten synapses at one place are together drawn as often as one other synapse."""
    index = opened.index
    in_train = synapses.in_part(index, "skeleton", "train")
    rows = np.flatnonzero(in_train & (synapses.labels(index, CLASSES) == 0))
    for column in synapses.POSITION:
        values = index[column].to_numpy().copy()
        values[rows[:10]] = values[rows[0]]
        place = index.column_names.index(column)
        index = index.set_column(place, column, pa.array(values))
    clustered = shards.Shards(opened.folder, opened.manifest, index)
    examples = input_pipeline.TrainBatches.of(clustered, config(balance_clusters=True))
    drawn = np.concatenate([examples.rows(step) for step in range(600)])
    counts = np.bincount(drawn, minlength=len(index))
    assert np.bincount(examples.labels[drawn]).tolist() == [2400] * 3
    chances = len(rows) - 9  # the ten synapses count as one
    # The counts are Binomial(2400, 1/chances); 5 standard deviations are allowed.
    for count in (counts[rows[:10]].sum(), *counts[rows[10:]]):
        assert abs(count - 2400 / chances) < 5 * (2400 / chances) ** 0.5
    # The draws are the same every time.
    again = input_pipeline.TrainBatches.of(clustered, config(balance_clusters=True))
    np.testing.assert_array_equal(again.rows(7), examples.rows(7))


@pytest.mark.long
def test_same_seed_same_batches_on_any_number_of_devices(opened: shards.Shards) -> None:
    streams = [stream(opened), stream(opened, devices=4), stream(opened, seed=1)]
    first, sharded, other = ([next(s) for _ in range(5)] for s in streams)
    assert len(sharded[0]["crop"].sharding.device_set) == 4
    for a, b in zip(first, sharded, strict=True):
        np.testing.assert_array_equal(a["crop"], b["crop"])
    assert any(
        (a["crop"] != b["crop"]).any() for a, b in zip(first, other, strict=True)
    )
    for each in streams:
        each.close()


def test_the_stream_goes_on_at_any_step(opened: shards.Shards) -> None:
    whole, later = stream(opened), stream(opened, first_step=7)
    for _ in range(7):
        next(whole)
    for _ in range(5):
        a, b = next(whole), next(later)
        np.testing.assert_array_equal(a["crop"], b["crop"])
        np.testing.assert_array_equal(a["label"], b["label"])
    whole.close()
    later.close()


@pytest.mark.parametrize("batch_size", [3, 7, 50])
def test_padded_pass_is_exact(opened: shards.Shards, batch_size: int) -> None:
    rows = np.arange(10, 30)
    mesh = sharding.make_mesh(jax.devices()[:1])
    got = [
        np.asarray(batch["crop"])
        for batch in input_pipeline.padded_batches(
            opened, rows, batch_size, sharding.batch(mesh)
        )
    ]
    assert all(len(crops) == batch_size for crops in got)
    crops = np.concatenate(got)[: len(rows)]
    source = opened.source()
    for row, crop in zip(rows, crops, strict=True):
        np.testing.assert_array_equal(crop, opened.decode(source[row])[1])


def test_a_class_without_train_examples_is_named(opened: shards.Shards) -> None:
    keep = [n != "dopamine" for n in opened.index["neurotransmitter"].to_pylist()]
    poorer = shards.Shards(opened.folder, opened.manifest, opened.index.filter(keep))
    with pytest.raises(UserError, match="no train example of dopamine in split"):
        input_pipeline.TrainBatches.of(poorer, config())
    other = config()
    other.split = "hemilineage"
    with pytest.raises(UserError, match="no split 'hemilineage'"):
        input_pipeline.TrainBatches.of(opened, other)
