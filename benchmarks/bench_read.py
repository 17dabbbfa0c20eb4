# SPDX-License-Identifier: Apache-2.0
"""Crops a second: read in chunk order through a cache, and one read a synapse.

    python benchmarks/bench_read.py --folder=FOLDER [--texture=URI] [--rounds=5]

The volume (2 GiB, N5, gzip, chunks of 16×128×128 at 40×4×4 nm) is `--texture` tiled, or
smooth noise, and stays in the folder for the next run. The synapses lie uniformly at
random. `crops.read` in the order of `crops.order` has an empty cache each round; the
loop opens the volume without a cache and, as the original does, reads the crop of one
synapse after the other in the table's order, of other `--sample` synapses each round.
The two alternate in one process; medians. A pass with `--small_cache_mib` comes first,
so both find the files in the system's cache. Bytes decoded are the chunks that
TensorStore read, those needed the union of the chunks under the crops. The peak memory
includes that of loading the texture, which comes before. Prints one line of JSON.
"""

import itertools
import json
import math
import pathlib
import resource
import statistics
import time

import numpy as np
import side_by_side
import textures
from absl import flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.em import crops, volumes

_FOLDER = flags.DEFINE_string(
    "folder", None, "Where the volume is, or is made.", required=True
)
_TEXTURE = flags.DEFINE_string("texture", None, "Volume to tile; without it, noise.")
_CROPS = flags.DEFINE_integer("crops", 20_000, "Synapses.", lower_bound=1)
_SAMPLE = flags.DEFINE_integer(
    "sample", 300, "Synapses that the loop reads in a round.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)
_CACHE_MIB = flags.DEFINE_integer("cache_mib", 1024, "Cache of crops.read.")
_SMALL_CACHE_MIB = flags.DEFINE_integer(
    "small_cache_mib", 64, "Cache of another pass, for the bytes it decodes."
)

_SHAPE_ZYX = (128, 4096, 4096)
_VOXEL_SIZE_NM_ZYX = (40.0, 4.0, 4.0)
_CROP_ZYX = (16, 160, 160)


def main() -> None:
    folder = files.make_folder(_FOLDER.value)
    texture = textures.load(_TEXTURE.value, _SHAPE_ZYX, (1, 1, 1))
    path = textures.tiled(folder, texture, _SHAPE_ZYX, _VOXEL_SIZE_NM_ZYX)
    volume = volumes.open(str(path))
    rng = np.random.default_rng(0)
    most = np.subtract(_SHAPE_ZYX, _CROP_ZYX)
    starts = rng.integers(0, most, (_CROPS.value, 3), endpoint=True)
    needed = crops.count_chunks(starts, _CROP_ZYX, volume)
    _, small = _in_chunk_order(path, starts, _SMALL_CACHE_MIB.value)
    decoded: dict[str, list[float]] = {"chunk_order": [], "loop": []}
    peak_rss_mib = []
    samples = itertools.count()

    def chunk_order() -> float:
        seconds, chunks = _in_chunk_order(path, starts, _CACHE_MIB.value)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        peak_rss_mib.append(usage.ru_maxrss / 2**10)
        decoded["chunk_order"].append(chunks / needed)
        return len(starts) / seconds

    def loop() -> float:
        first = next(samples) * _SAMPLE.value
        sample = starts[np.arange(first, first + _SAMPLE.value) % len(starts)]
        seconds, chunks = _one_by_one(path, sample)
        # Of the loop only a sample is read: what it would decode for all crops.
        decoded["loop"].append(chunks / len(sample) * len(starts) / needed)
        return len(sample) / seconds

    sides = {"chunk_order": chunk_order, "loop": loop}
    rates = side_by_side.alternate(sides, _ROUNDS.value)
    chunk_mib = math.prod(volume.chunk_shape_zyx) / 2**20
    medians = {name: statistics.median(values) for name, values in decoded.items()}
    report = {
        "benchmark": "read",
        "unit": "crops/s",
        **side_by_side.summary(rates, "chunk_order"),
        "decoded_over_needed": medians,
        "decoded_over_needed_small_cache": small / needed,
        "needed_mib": needed * chunk_mib,
        "loop_decoded_mib_per_crop": medians["loop"] * needed * chunk_mib / len(starts),
        "crops": len(starts),
        "loop_sample": _SAMPLE.value,
        "cache_mib": _CACHE_MIB.value,
        "small_cache_mib": _SMALL_CACHE_MIB.value,
        "crop_shape_zyx": _CROP_ZYX,
        "volume_shape_zyx": volume.shape_zyx,
        "chunk_shape_zyx": volume.chunk_shape_zyx,
        "volume_on_disk_mib": _bytes_on_disk(path) / 2**20,
        "texture": _TEXTURE.value or "noise",
        # The allocator keeps what the caches of former rounds held: the first counts.
        "peak_rss_mib": peak_rss_mib[0],
        "peak_rss_mib_all_rounds": peak_rss_mib[-1],
    }
    packages = ("synister_jax", "tensorstore", "numpy")
    print(json.dumps(report | side_by_side.about(*packages)))


def _in_chunk_order(
    path: pathlib.Path, starts: np.ndarray, cache_mib: int
) -> tuple[float, int]:
    """Seconds and chunks decoded of all crops, opening and ordering included."""
    before = time.perf_counter()
    volume = volumes.open(str(path), cache_bytes=cache_mib << 20)
    chunks_before = textures.chunks_read()
    ordered = starts[crops.order(starts, _CROP_ZYX, volume)]
    for crop in crops.read(volume, ordered, _CROP_ZYX):
        if crop.unreadable:
            raise UserError(f"{path} lacks chunks; remove it and rerun")
    return time.perf_counter() - before, textures.chunks_read() - chunks_before


def _one_by_one(path: pathlib.Path, starts: np.ndarray) -> tuple[float, int]:
    """Seconds and chunks decoded of these crops, each waited for."""
    before = time.perf_counter()
    volume = volumes.open(str(path), cache_bytes=0)
    chunks_before = textures.chunks_read()
    for start in starts:
        volume.read(start, start + _CROP_ZYX)
    return time.perf_counter() - before, textures.chunks_read() - chunks_before


def _bytes_on_disk(path: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


if __name__ == "__main__":
    command.run(main)
