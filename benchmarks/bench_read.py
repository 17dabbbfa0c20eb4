# SPDX-License-Identifier: Apache-2.0
"""Measures the crops per second that are read in chunk order, and one by one.

    python -m benchmarks.bench_read --folder=FOLDER --texture=URI --rounds=5

The volume has 2 GiB (N5, gzip, chunks of 16×128×128 at 40×4×4 nm). It repeats the
`--texture`, or smooth noise. The synapses are at uniformly random positions.
`chunk_order` is `crops.read` in the order of `crops.order`, with an empty cache in each
round. `loop` opens the volume without a cache, and reads one crop after the other, as
the original does. Both run in turns in one process.

A first pass reads all crops with a cache of 64 MiB. Afterwards all files are in the
cache of the operating system. The peak memory includes the memory to load the texture.
"""

import resource

import numpy as np

from benchmarks import chunk_order, command_line, made_inputs
from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.em import crops, volumes

_TEXTURE = command_line.define_texture()
_CROPS = command_line.define_count(
    "crops", 20_000, "Read the crops of this many synapses."
)
_SAMPLE = command_line.define_count(
    "sample", 300, "Read this many crops in a round of the loop."
)

_SHAPE_ZYX = (128, 4096, 4096)
_VOXEL_SIZE_NM_ZYX = (40.0, 4.0, 4.0)
_CROP_ZYX = (16, 160, 160)


def main() -> None:
    path = made_inputs.tiled_volume(
        command_line.folder(), _TEXTURE.value, _SHAPE_ZYX, _VOXEL_SIZE_NM_ZYX
    )
    volume = volumes.open(str(path))
    starts = made_inputs.random_starts(_SHAPE_ZYX, _CROP_ZYX, _CROPS.value)
    peak_rss_mib = []

    def read_all(cache_mib: int = 1024) -> None:
        opened = volumes.open(str(path), cache_bytes=cache_mib << 20)
        ordered = starts[crops.order(starts, _CROP_ZYX, opened)]
        for crop in crops.read(opened, ordered, _CROP_ZYX):
            if crop.unreadable:
                raise UserError(f"{path} lacks chunks; remove it and run again")
        usage = resource.getrusage(resource.RUSAGE_SELF)
        peak_rss_mib.append(usage.ru_maxrss / 2**10)

    def read_one_by_one(rows: np.ndarray) -> None:
        opened = volumes.open(str(path), cache_bytes=0)
        for start in starts[rows]:
            opened.read(start, start + _CROP_ZYX)

    _, small = chunk_order.timed(lambda: read_all(64))
    report = chunk_order.compare(
        volume, starts, _CROP_ZYX, read_all, read_one_by_one, _SAMPLE.value
    )
    needed = crops.count_chunks(starts, _CROP_ZYX, volume)
    report |= {
        "decoded_over_needed_small_cache": small / needed,
        "texture": _TEXTURE.value or "noise",
        # The allocator keeps the memory of the caches of earlier rounds, so only the
        # first round gives the peak memory of one cache.
        "peak_rss_mib": peak_rss_mib[1],
        "peak_rss_mib_all_rounds": peak_rss_mib[-1],
    }
    command_line.print_report("read", "crops/s", report)


if __name__ == "__main__":
    command.run(main)
