# SPDX-License-Identifier: Apache-2.0
"""Compares reading in the order of chunks with one read a synapse."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from benchmarks import command_line, side_by_side
from synister_jax.em import crops, volumes


def compare(
    volume: volumes.Volume,
    starts: np.ndarray,
    shape_zyx: Sequence[int],
    read_all: Callable[[], None],
    read_one_by_one: Callable[[np.ndarray], None],
    sample: int,
) -> dict[str, Any]:
    """Alternates the two ways, and counts the bytes that each decodes.

    Bytes decoded are the chunks that TensorStore read, those needed the union of the
    chunks under the boxes.

    Args:
      starts: Starts [count, 3] of boxes of `shape_zyx`.
      read_all: Reads all boxes, with nothing in a cache.
      read_one_by_one: Reads the boxes of these rows; each round gets `sample` others.
    """
    needed = crops.count_chunks(starts, shape_zyx, volume)
    decoded: dict[str, list[float]] = {"chunk_order": [], "loop": []}
    rounds = itertools.count()

    def chunk_order() -> float:
        seconds, chunks = timed(read_all)
        decoded["chunk_order"].append(chunks / needed)
        return len(starts) / seconds

    def loop() -> float:
        rows = (next(rounds) * sample + np.arange(sample)) % len(starts)
        seconds, chunks = timed(lambda: read_one_by_one(rows))
        # Only a sample is read: what it would decode for all.
        decoded["loop"].append(chunks / sample * len(starts) / needed)
        return sample / seconds

    sides = {"chunk_order": chunk_order, "loop": loop}
    rates = side_by_side.alternate(sides, command_line.ROUNDS.value)
    return side_by_side.summary(rates, "chunk_order") | {
        "decoded_over_needed": side_by_side.medians(decoded),
        "needed_mib": needed * math.prod(volume.chunk_shape_zyx) / 2**20,
        "crops": len(starts),
        "loop_sample": sample,
    }


def timed(read: Callable[[], None]) -> tuple[float, int]:
    """Returns the seconds of `read`, and how many chunks it found in no cache."""
    chunks, start = _chunks_read(), time.perf_counter()
    read()
    return time.perf_counter() - start, _chunks_read() - chunks


def _chunks_read() -> int:
    name = "/tensorstore/cache/miss_count"
    metrics = ts.experimental_collect_matching_metrics(name)
    return sum(value["value"] for metric in metrics for value in metric["values"])
