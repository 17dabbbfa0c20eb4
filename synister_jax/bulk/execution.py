# SPDX-License-Identifier: Apache-2.0
"""Computes units of a plan: reads crops, predicts probabilities, writes result files.

The three steps overlap. While the devices compute a batch, the crops of the next
batches are read and copied to the devices, and the result of the previous unit is
written.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from synister_jax.base.progress import Progress
from synister_jax.bulk import unit_results
from synister_jax.bulk.planning import Plan
from synister_jax.bulk.unit_results import UnitResult
from synister_jax.em import crops, volumes
from synister_jax.network import inference

# At most this many batches are read ahead, and at most this many wait for their
# results. At most four batches, and the batch that is being started, are therefore on
# the devices.
_AHEAD = 2
_WRITES = 2
_T = TypeVar("_T")


@dataclasses.dataclass
class Times:
    """The seconds that each stage took. The stages overlap."""

    synapses: int = 0
    read: float = 0.0  # waiting for crops: reading, decoding and cutting them
    put: float = 0.0  # copying crops from the host to the devices
    compute: float = 0.0  # the devices compute at least one batch
    write: float = 0.0
    storage: float = 0.0  # the sum over all reads of the volume; they run in parallel
    wall: float = 0.0  # from the start to the end

    def add(self, other: "Times") -> None:
        """Adds the synapses and seconds of `other` to this object."""
        for field in dataclasses.fields(self):
            both = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, both)

    def text(self, whose: str = "") -> str:
        """Returns a line to print. `whose` follows the total of the seconds."""
        rate = self.synapses / max(self.wall, 1e-9)
        busy = self.compute / max(self.wall, 1e-9)
        return (
            f"{self.synapses:,} synapses in {self.wall:,.1f} s{whose} ({rate:,.1f}/s): "
            f"reading and decoding {self.read:,.1f} s (storage {self.storage:,.1f} s "
            f"over parallel reads), to the device {self.put:,.1f} s, computing "
            f"{self.compute:,.1f} s, writing {self.write:,.1f} s; device busy "
            f"{busy:.0%} of the time"
        )


def execute(
    plan: Plan,
    units: Sequence[int],
    classifier: inference.Classifier,
    volume: volumes.Volume,
    progress: Progress | None = None,
    retry_missing: bool = False,
) -> Times:
    """Computes units and writes their result files, and returns the times.

    Each file depends on the arguments alone, and not on when or where it is computed.

    Args:
      units: the numbers of the units. Units with a valid result file are skipped.
      progress: counts the synapses of finished batches and of skipped units.
      retry_missing: do not skip finished units: predict the rows again whose crop could
        not be read. The other rows keep their predictions.

    Raises:
      UserError: the volume cannot be read, a result file cannot be written, or a batch
        does not fit into memory. The result files that exist are kept.
    """
    times = Times()
    started, storage = time.perf_counter(), volumes.storage_seconds()
    pool = concurrent.futures.ThreadPoolExecutor
    pending: collections.deque[tuple[_Batch, concurrent.futures.Future]]
    pending = collections.deque()
    writes: collections.deque[concurrent.futures.Future] = collections.deque()
    with pool(1) as reader, pool(1) as collector, pool(1) as writer:
        collect = _Collect(times)

        def finish(batch: _Batch, future: concurrent.futures.Future) -> None:
            batch.unit.add(batch, future.result())
            times.synapses += batch.count
            if progress is not None:
                progress.add(batch.count)
            if batch.is_last:
                if len(writes) == _WRITES:
                    writes.popleft().result()
                writes.append(writer.submit(_write, plan, batch.unit, times))

        todo = _todo(plan, units, retry_missing, progress)
        batches = _batches(plan, todo, classifier, volume, times)
        with inference.told_if_too_large(classifier.batch_size):
            for batch, records in _ahead(reader, batches):
                start = time.perf_counter()
                result = classifier.start(records)
                pending.append((batch, collector.submit(collect, result, start)))
                if len(pending) == _AHEAD:
                    finish(*pending.popleft())
            while pending:
                finish(*pending.popleft())
        while writes:
            writes.popleft().result()
    times.wall = time.perf_counter() - started
    # Rounding can make a difference of two totals negative.
    times.storage = max(0.0, volumes.storage_seconds() - storage)
    return times


class _Unit:
    """The result of a unit while its batches are being computed."""

    def __init__(self, plan: Plan, number: int, before: UnitResult | None) -> None:
        self.number = number
        self.rows, self.starts = plan.unit(number)
        n, k = len(self.rows), len(plan.about["classes"])
        self.whole = np.zeros(n, bool)
        self.probabilities = np.zeros((n, k), np.float32)
        if before is not None:
            self.whole = before.whole.copy()
            self.probabilities = before.probabilities.copy()
        self.todo = np.flatnonzero(~self.whole)
        self.unreadable: set[crops.Corner] = set()

    def add(self, batch: "_Batch", probabilities: np.ndarray) -> None:
        places = self.todo[batch.first : batch.first + batch.count]
        self.whole[places] = batch.whole
        # A crop with unreadable voxels has no prediction. Zeros are stored for it, so
        # that the content of the file does not depend on the missing voxels.
        values = np.where(batch.whole[:, None], probabilities[: batch.count], 0)
        self.probabilities[places] = values
        self.unreadable.update(batch.unreadable)

    def part(self) -> UnitResult:
        unreadable = frozenset(self.unreadable)
        return UnitResult(self.rows, self.whole, self.probabilities, unreadable)


@dataclasses.dataclass(frozen=True)
class _Batch:
    unit: _Unit
    first: int  # in the unit's `todo`
    whole: np.ndarray  # bool [count]
    unreadable: set[crops.Corner]

    @property
    def count(self) -> int:
        return len(self.whole)

    @property
    def is_last(self) -> bool:
        return self.first + self.count == len(self.unit.todo)


def _todo(
    plan: Plan, units: Sequence[int], retry_missing: bool, progress: Progress | None
) -> Iterator[_Unit]:
    """Yields the units to compute; skips units that another process has finished."""
    for number in units:
        before = unit_results.read(plan, number)
        if before is None or retry_missing:
            yield _Unit(plan, number, before)
        elif progress is not None:
            progress.add(plan.size(number))


def _batches(
    plan: Plan,
    units: Iterator[_Unit],
    classifier: inference.Classifier,
    volume: volumes.Volume,
    times: Times,
) -> Iterator[tuple[_Batch, jax.Array]]:
    """Yields each batch of all units with its crops, which are on the devices."""
    for unit in units:
        read = crops.read(volume, unit.starts[unit.todo], plan.about["crop_shape_zyx"])
        for first in range(0, len(unit.todo), classifier.batch_size):
            start = time.perf_counter()
            several = list(itertools.islice(read, classifier.batch_size))
            is_read = time.perf_counter()
            records = classifier.put([crop.voxels for crop in several])
            times.read += is_read - start
            times.put += time.perf_counter() - is_read
            whole = np.array([not crop.unreadable for crop in several])
            unreadable = set(itertools.chain(*(crop.unreadable for crop in several)))
            yield _Batch(unit, first, whole, unreadable), records


class _Collect:
    """Fetches results in the order of their start, and measures the computing time."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._free_since = 0.0

    def __call__(self, result: jax.Array, started: float) -> np.ndarray:
        values = np.asarray(result)
        now = time.perf_counter()
        self._times.compute += now - max(started, self._free_since)
        self._free_since = now
        return values


def _write(plan: Plan, unit: _Unit, times: Times) -> None:
    start = time.perf_counter()
    unit_results.write(plan, unit.number, unit.part())
    times.write += time.perf_counter() - start


def _ahead(
    pool: concurrent.futures.Executor, items: Iterator[_T], depth: int = _AHEAD
) -> Iterator[_T]:
    """Yields the items; the thread of the pool makes up to `depth` of them ahead."""
    stopped = threading.Event()

    def following() -> list[_T]:
        """Returns a list with the next item, or an empty list at the end."""
        return [] if stopped.is_set() else list(itertools.islice(items, 1))

    waiting = collections.deque(pool.submit(following) for _ in range(depth))
    try:
        while found := waiting.popleft().result():
            waiting.append(pool.submit(following))
            yield found[0]
    finally:
        stopped.set()
