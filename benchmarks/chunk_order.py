# SPDX-License-Identifier: Apache-2.0
"""Compares reading crops in the order of chunks with one read per synapse."""

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
    """Measures both sides in turns, and counts the bytes that each decodes.

    The decoded bytes are those of the chunks that TensorStore reads. The needed bytes
    are those of all chunks that overlap a box, each counted once.

    Args:
      volume: the volume that is read.
      starts: the starts [count, 3] in voxels of the boxes.
      shape_zyx: the shape of each box in voxels.
      read_all: reads all boxes, beginning with an empty cache.
      read_one_by_one: reads the boxes of the given rows.
      sample: the number of rows for `read_one_by_one`; each round gets other rows.
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
        # The loop reads only a sample. The result is scaled to all boxes.
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
    """Returns the seconds of `read`, and the number of chunks that no cache had."""
    chunks, start = _chunks_read(), time.perf_counter()
    read()
    return time.perf_counter() - start, _chunks_read() - chunks


def _chunks_read() -> int:
    name = "/tensorstore/cache/miss_count"
    metrics = ts.experimental_collect_matching_metrics(name)
    return sum(value["value"] for metric in metrics for value in metric["values"])
