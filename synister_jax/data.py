# SPDX-License-Identifier: Apache-2.0
"""Grain pipelines over shards: an endless class-uniform stream, and an exact pass."""

from collections.abc import Iterator, Sequence

import grain
import jax
import ml_collections
import numpy as np

from synister_jax import augment, synapses
from synister_jax import shards as shards_lib
from synister_jax.command import UserError
from synister_jax.shards import Shards

Batch = dict[str, jax.Array]

# Batches, not examples: a batch of FAFB crops is 5 MB.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


def open_shards(config: ml_collections.ConfigDict) -> Shards:
    """The shards of a config; `UserError` when they are not what it needs."""
    if config.shards is None:
        raise UserError("give --config.shards=FOLDER, made by tools/shard_crops.py")
    shards = shards_lib.open(config.shards)
    shards_lib.require(
        shards,
        crop_shape_zyx=config.crop_shape_zyx,
        margin_vx_zyx=augment.margin_vx_zyx(config.augment),
        voxel_size_nm_zyx=config.voxel_size_nm_zyx,
        classes=config.classes,
    )
    return shards


def train_batches(
    shards: Shards, split: str, batch_size: int, seed: int, sharding: jax.NamedSharding
) -> grain.DatasetIterator:
    """Endless batches from the train part, every class equally often.

    Each class is shuffled anew in each of its own epochs; classes take turns. A batch
    is {crop: uint8 [batch, *record], label: int32 [batch]} on the devices. The
    iterator's state is its position; batch i depends on (seed, i) alone.

    Raises:
      UserError: a class has no example in the train part.
    """
    in_train = synapses.in_part(shards.index, split, "train")
    labels = synapses.labels(shards.index, shards.classes)
    empty = [
        name
        for i, name in enumerate(shards.classes)
        if not (in_train & (labels == i)).any()
    ]
    if empty:
        raise UserError(
            f"shards {shards.folder} have no train example of {', '.join(empty)} in "
            f"split {split!r}; remove the class from the config or choose another split"
        )
    source = shards.source()

    def read(row: np.int64) -> dict[str, np.ndarray]:
        _, crop = shards.decode(source[row])
        return {"crop": crop, "label": labels[row]}

    of_class = []
    for label in range(len(shards.classes)):
        rows = np.flatnonzero(in_train & (labels == label))
        class_seed = int(np.random.SeedSequence((seed, label)).generate_state(1)[0])
        dataset = grain.MapDataset.source(rows).seed(class_seed).shuffle().repeat()
        of_class.append(dataset)
    dataset = grain.MapDataset.mix(of_class).map(read).batch(batch_size)
    return iter(_on_devices(dataset, sharding))


def padded_batches(
    shards: Shards, rows: Sequence[int], batch_size: int, sharding: jax.NamedSharding
) -> Iterator[Batch]:
    """The records of `rows` once, in order, {crop} as in `train_batches`.

    The last batch is filled up with repetitions: the consumer knows from len(rows)
    how many results count.
    """
    source = shards.source()
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % batch_size)])
    dataset = grain.MapDataset.source(filled)
    dataset = dataset.map(lambda row: {"crop": shards.decode(source[row])[1]})
    iterator = iter(_on_devices(dataset.batch(batch_size), sharding))
    try:
        yield from iterator
    finally:
        iterator.close()


def _on_devices(
    dataset: grain.MapDataset, sharding: jax.NamedSharding
) -> grain.IterDataset:
    def put(batch: dict[str, np.ndarray]) -> Batch:
        return {
            name: jax.make_array_from_process_local_data(sharding, values)
            for name, values in batch.items()
        }

    return dataset.to_iter_dataset(_READ).map(put)
