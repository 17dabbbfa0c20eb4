# SPDX-License-Identifier: Apache-2.0
"""Grain pipelines over shards: an endless class-uniform stream, and an exact pass."""

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

# Batches, not examples: with its context a batch of FAFB crops is 14 MB.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


def open_shards(config: ml_collections.ConfigDict, training: bool = True) -> Shards:
    """The shards of a config; `UserError` when they are not what it needs.

    Args:
      training: their context must be large enough for the augmentation.
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
                f"shards {shards.folder} were cut with {name} = {count}, the config "
                f"says {config[name]}; cut shards with this config, or set "
                f"config.{name}"
            )
    return shards


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Batches from the train part without end; batch i depends on (seed, i) alone.

    Hence nothing of the stream is saved: a run that goes on at step i asks for the
    batches from i on, in however many processes.
    """

    shards: Shards
    labels: np.ndarray  # of the records, [n] int32
    order: grain.MapDataset  # endless: example → record
    batch_size: int  # over all processes
    seed: int

    @classmethod
    def of(cls, shards: Shards, config: ml_collections.ConfigDict) -> "TrainBatches":
        """Classes take turns, so each comes equally often.

        Within a class every example comes once an epoch, in an order that is new in
        each; with `config.balance_clusters` they are drawn instead, each with the
        original's chance 1/n, n synapses of its class being as close to it as
        jitter reaches.

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
        """Records of the batch that follows `step` updates, [batch] int64."""
        first = step * self.batch_size
        rows = np.array([self.order[first + i] for i in range(self.batch_size)])
        # Else a part of an accumulated batch, every n-th example, could miss classes.
        return np.random.default_rng((self.seed, step)).permutation(rows)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{crop: uint8 [n, *record], label: int32 [n]}."""
        crops = _crops(self.shards, self._source, rows)
        return {"crop": crops, "label": self.labels[rows].astype(np.int32)}

    def stream(
        self, first_step: int, placed: jax.NamedSharding
    ) -> grain.DatasetIterator:
        """Batches from `first_step` on, as global arrays on the devices.

        Each process reads the examples of its own devices only.
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
    """One of `rows`, with the chances whose cumulative sum is `up_to`."""
    place = np.searchsorted(up_to, rng.random() * up_to[-1], side="right")
    return rows[min(place, len(rows) - 1)]


def acceptance(
    positions_nm_zyx: np.ndarray, labels: np.ndarray, half_box_nm_zyx: Sequence[float]
) -> np.ndarray:
    """1/n for each of the synapses, [n] float64 in (0, 1].

    Drawn uniformly and kept with this probability, a synapse of a cluster is as likely
    as the whole of the cluster would be, as in the original's `RandomLocation`.

    Args:
      positions_nm_zyx: [n, 3], finite.
      labels: [n] of any integers; synapses of different labels do not count together.
      half_box_nm_zyx: n counts the synapses that differ by no more than this on every
        axis, itself included. On an axis with 0 only equal coordinates count.
    """
    from scipy import spatial  # half a second to import

    scaled = np.empty(np.shape(positions_nm_zyx), np.float64)
    for axis, half in enumerate(half_box_nm_zyx):
        if half > 0:
            scaled[:, axis] = positions_nm_zyx[:, axis] / half
        else:
            _, order = np.unique(positions_nm_zyx[:, axis], return_inverse=True)
            scaled[:, axis] = 2.0 * order  # different ones lie outside the radius of 1
    result = np.empty(len(scaled), np.float64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        tree = spatial.cKDTree(scaled[rows])
        # Sections are as far apart as a box may be half wide: rounding must not decide
        # on synapses at its very border.
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
    """The records of `rows` once, in order, {crop: uint8 [batch, *record]}.

    The last batch is filled up with repetitions: the consumer knows from len(rows)
    how many results count.
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
    """uint8 [n, *record]."""
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
