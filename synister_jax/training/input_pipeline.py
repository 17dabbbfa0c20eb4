# SPDX-License-Identifier: Apache-2.0
"""Batches from shards with Grain: an endless stream for training, or one exact pass."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import grain
import jax
import ml_collections
import numpy as np

from synister_jax.base.errors import UserError
from synister_jax.network import sharding
from synister_jax.tables import synapses
from synister_jax.training import augment
from synister_jax.training import shards as shards_lib
from synister_jax.training.shards import Shards

Batch = dict[str, jax.Array]

# The buffer counts batches. A batch of FAFB crops with their context has 14 MB.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


def open_shards(config: ml_collections.ConfigDict, training: bool = True) -> Shards:
    """Opens the shards that a config names.

    Args:
      config: the settings.
      training: whether the shards must have enough context for augmentation.

    Raises:
      UserError: the config names no shards, or they do not fit the config.
    """
    margin = augment.AugmentSettings.of(config).margin_vx_zyx if training else (0, 0, 0)
    if config.shards is None:
        raise UserError("give --config.shards=FOLDER, made by tools/shard_crops.py")
    shards = shards_lib.open(config.shards)
    shards_lib.require(
        shards,
        crop_shape_zyx=config.crop_shape_zyx,
        margin_vx_zyx=margin,
        voxel_size_nm_zyx=config.voxel_size_nm_zyx,
        classes=config.classes,
    )
    cut_with = {
        "neither_crops": shards.manifest.get("neither_crops", 0),
        "unknown_per_class": shards.manifest.get("unknown_per_class", 0),
    }
    for name, count in cut_with.items() if training else ():
        if count != config[name]:
            raise UserError(
                f"shards {shards.folder} were cut with {name} = {count}, but the "
                f"config says {config[name]}; cut shards with this config, or set "
                f"config.{name}"
            )
    return shards


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """An endless stream of batches from the train part.

    Batch i depends only on (seed, i). So nothing of the stream is saved: a run that
    continues at step i asks for the batches from i on, in any number of processes.
    """

    shards: Shards
    labels: np.ndarray  # the labels of the records, int32 [n]
    order: grain.MapDataset  # endless, from the number of an example to its record
    batch_size: int  # over all processes
    seed: int

    @classmethod
    def of(cls, shards: Shards, config: ml_collections.ConfigDict) -> "TrainBatches":
        """Returns the batches of a config. The classes take turns.

        So each class comes equally often. Within a class, every example comes once in
        an epoch, and each epoch has another order. With `config.balance_clusters`,
        examples are drawn instead, with the probability 1/n of the original: n counts
        the synapses of the class that are as close to the example as jitter reaches.

        Raises:
          UserError: a class has no example in the train part.
        """
        in_train = synapses.in_part(shards.index, config.split, "train")
        labels = synapses.labels(shards.index, shards.classes)
        of_class = [
            np.flatnonzero(in_train & (labels == i)) for i in range(len(shards.classes))
        ]
        empty = [
            name
            for name, rows in zip(shards.classes, of_class, strict=True)
            if not len(rows)
        ]
        if empty:
            raise UserError(
                f"shards {shards.folder} have no train example of {', '.join(empty)} "
                f"in split {config.split!r}; remove the class from the config or "
                "choose another split"
            )
        chances = None
        if config.balance_clusters:
            reach = augment.AugmentSettings.of(config).jitter_zyx
            half_box_nm_zyx = np.multiply(reach, config.voxel_size_nm_zyx)
            chances = np.zeros(len(labels))
            chances[in_train] = acceptance(
                synapses.positions_nm_zyx(shards.index)[in_train],
                labels[in_train],
                half_box_nm_zyx,
            )
        parts = []
        for label, rows in enumerate(of_class):
            sequence = np.random.SeedSequence((config.seed, label))
            dataset = grain.MapDataset.source(rows)
            dataset = dataset.seed(int(sequence.generate_state(1)[0]))
            if chances is None:
                parts.append(dataset.shuffle().repeat())
            else:
                draw = functools.partial(_draw, rows, np.cumsum(chances[rows]))
                parts.append(dataset.repeat().random_map(draw))
        order = grain.MapDataset.mix(parts)
        return cls(shards, labels, order, config.batch_size, config.seed)

    def rows(self, step: int) -> np.ndarray:
        """Returns the records of the batch after `step` updates, int64 [batch]."""
        first = step * self.batch_size
        rows = np.array([self.order[first + i] for i in range(self.batch_size)])
        # Without this, a part of an accumulated batch could have no example of a class,
        # because a part takes every n-th example.
        return np.random.default_rng((self.seed, step)).permutation(rows)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {crop: uint8 [n, *record], label: int32 [n]}."""
        crops = _crops(self.shards, self._source, rows)
        return {"crop": crops, "label": self.labels[rows].astype(np.int32)}

    def stream(
        self, first_step: int, placed: jax.NamedSharding
    ) -> grain.DatasetIterator:
        """Returns the batches from `first_step` on, as global arrays on the devices.

        Each process reads only the examples of its own devices.
        """
        places = sharding.local_places(placed, self.batch_size)

        def local(step: int) -> dict[str, np.ndarray]:
            return self.read(self.rows(step)[places])

        steps = grain.MapDataset.range(first_step, np.iinfo(np.int64).max)
        return iter(_on_devices(steps.map(local), placed, self.batch_size))

    @functools.cached_property
    def _source(self) -> grain.sources.ArrayRecordDataSource:
        return self.shards.source()


def _draw(
    rows: np.ndarray, up_to: np.ndarray, _: np.int64, rng: np.random.Generator
) -> np.int64:
    """Draws one of `rows`. `up_to` is the cumulative sum of their probabilities."""
    place = np.searchsorted(up_to, rng.random() * up_to[-1], side="right")
    return rows[min(place, len(rows) - 1)]


def acceptance(
    positions_nm_zyx: np.ndarray, labels: np.ndarray, half_box_nm_zyx: Sequence[float]
) -> np.ndarray:
    """Returns for each synapse the probability to keep it, float64 [n] in (0, 1].

    The probability is 1/m, where m counts the close synapses with the same label. Then
    a cluster of synapses is drawn as often as a single one. The original's
    `RandomLocation` does the same.

    Args:
      positions_nm_zyx: float64 [n, 3], finite.
      labels: int [n].
      half_box_nm_zyx: two synapses are close if they differ by at most this on every
        axis. A synapse is close to itself. On an axis with 0, only equal coordinates
        are close.
    """
    from scipy import spatial  # takes half a second to import

    scaled = np.empty(np.shape(positions_nm_zyx), np.float64)
    for axis, half in enumerate(half_box_nm_zyx):
        if half > 0:
            scaled[:, axis] = positions_nm_zyx[:, axis] / half
        else:
            _, order = np.unique(positions_nm_zyx[:, axis], return_inverse=True)
            scaled[:, axis] = 2.0 * order  # unequal values are further than 1 apart
    result = np.empty(len(scaled), np.float64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        tree = spatial.cKDTree(scaled[rows])
        # Two sections may be exactly half a box apart. Rounding must not decide whether
        # such synapses are close.
        near = tree.query_ball_point(
            scaled[rows], 1 + 1e-9, p=np.inf, return_length=True
        )
        result[rows] = 1 / near
    return result


def padded_batches(
    shards: Shards,
    rows: Sequence[int] | np.ndarray,
    batch_size: int,
    placed: jax.NamedSharding,
) -> Iterator[Batch]:
    """Yields the records of `rows` once, in order, as {crop: uint8 [batch, *record]}.

    The last batch is filled with repetitions of the last row. len(rows) says how many
    results count.
    """
    source = shards.source()
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % batch_size)])
    places = sharding.local_places(placed, batch_size)

    def local(batch_rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"crop": _crops(shards, source, batch_rows[places])}

    dataset = grain.MapDataset.source(filled.reshape(-1, batch_size)).map(local)
    iterator = iter(_on_devices(dataset, placed, batch_size))
    try:
        yield from iterator
    finally:
        iterator.close()


def _crops(
    shards: Shards, source: grain.sources.ArrayRecordDataSource, rows: np.ndarray
) -> np.ndarray:
    """Returns the crops of the rows, uint8 [n, *record]."""
    records = source.__getitems__([int(row) for row in rows])
    return np.stack([shards.decode(record)[1] for record in records])


def _on_devices(
    dataset: grain.MapDataset, placed: jax.NamedSharding, batch_size: int
) -> grain.IterDataset:
    def put(batch: dict[str, np.ndarray]) -> Batch:
        return {
            name: jax.make_array_from_process_local_data(
                placed, values, (batch_size, *values.shape[1:])
            )
            for name, values in batch.items()
        }

    return dataset.to_iter_dataset(_READ).map(put)
