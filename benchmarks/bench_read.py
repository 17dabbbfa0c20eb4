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
TensorStore read, those needed the union of the chunks under the crops. The run that
makes the volume has that in its peak memory too. Prints one line of JSON.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import shutil
import statistics
import sys
import time

import numpy as np
import tensorstore as ts
from absl import flags
from scipy import ndimage

from synister_jax import command, crops, files, volumes

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
_CHUNK_ZYX = (16, 128, 128)
_VOXEL_SIZE_NM_ZYX = (40.0, 4.0, 4.0)
_CROP_ZYX = (16, 160, 160)


def main() -> None:
    path = _volume_path()
    volume = volumes.open(str(path))
    rng = np.random.default_rng(0)
    most = np.subtract(_SHAPE_ZYX, _CROP_ZYX)
    starts = rng.integers(0, most, (_CROPS.value, 3), endpoint=True)
    union = _chunks_under(starts, volume)
    _, small = _in_chunk_order(path, starts, _SMALL_CACHE_MIB.value)
    rates: dict[str, list[float]] = {"chunk_order": [], "loop": []}
    decoded: dict[str, list[float]] = {"chunk_order": [], "loop": []}
    peak_rss_mib = []
    for index in range(_ROUNDS.value):
        seconds, chunks = _in_chunk_order(path, starts, _CACHE_MIB.value)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        peak_rss_mib.append(usage.ru_maxrss / 2**10)
        rates["chunk_order"].append(len(starts) / seconds)
        decoded["chunk_order"].append(chunks / union)
        rows = np.arange(index * _SAMPLE.value, (index + 1) * _SAMPLE.value)
        sample = starts[rows % len(starts)]
        seconds, chunks = _one_by_one(path, sample)
        rates["loop"].append(len(sample) / seconds)
        decoded["loop"].append(chunks / len(sample))
        now = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())
        print(f"{index} {now} crops/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    per_crop = statistics.median(decoded["loop"])
    chunk_bytes = math.prod(volume.chunk_shape_zyx)
    report = {
        "benchmark": "read",
        "crops_per_second": medians,
        "rounds_crops_per_second": rates,
        "ratio": medians["chunk_order"] / medians["loop"],
        "decoded_over_union": statistics.median(decoded["chunk_order"]),
        "decoded_over_union_small_cache": small / union,
        # Of the loop only a sample is read: what it would decode for all crops.
        "loop_decoded_over_union": per_crop * len(starts) / union,
        "union_mib": union * chunk_bytes / 2**20,
        "loop_decoded_mib_per_crop": per_crop * chunk_bytes / 2**20,
        "crops": len(starts),
        "loop_sample": _SAMPLE.value,
        "rounds": _ROUNDS.value,
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
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    for package in ("synister_jax", "tensorstore", "numpy"):
        report[package] = importlib.metadata.version(package)
    print(json.dumps(report))


def _in_chunk_order(
    path: pathlib.Path, starts: np.ndarray, cache_mib: int
) -> tuple[float, int]:
    """Seconds and chunks decoded of all crops, opening and ordering included."""
    before = time.perf_counter()
    volume = volumes.open(str(path), cache_bytes=cache_mib << 20)
    chunks_before = _chunks_read()
    ordered = starts[crops.order(starts, _CROP_ZYX, volume)]
    for crop in crops.read(volume, ordered, _CROP_ZYX):
        if crop.unreadable:
            raise command.UserError(f"{path} lacks chunks; remove it and rerun")
    return time.perf_counter() - before, _chunks_read() - chunks_before


def _one_by_one(path: pathlib.Path, starts: np.ndarray) -> tuple[float, int]:
    """Seconds and chunks decoded of these crops, each waited for."""
    before = time.perf_counter()
    volume = volumes.open(str(path), cache_bytes=0)
    chunks_before = _chunks_read()
    for start in starts:
        volume.read(start, start + _CROP_ZYX)
    return time.perf_counter() - before, _chunks_read() - chunks_before


def _chunks_read() -> int:
    """Chunks that were in no cache of TensorStore, since the process began."""
    name = "/tensorstore/cache/miss_count"
    metrics = ts.experimental_collect_matching_metrics(name)
    return sum(value["value"] for metric in metrics for value in metric["values"])


def _chunks_under(starts: np.ndarray, volume: volumes.Volume) -> int:
    """How many chunks the crops touch together."""
    chunk = np.asarray(volume.chunk_shape_zyx)
    touched = np.zeros(-(-np.asarray(volume.shape_zyx) // chunk), bool)
    last = (starts + _CROP_ZYX - 1) // chunk
    for low, high in zip(starts // chunk, last, strict=True):
        touched[volumes.box_of(low, high + 1)] = True
    return int(touched.sum())


def _volume_path() -> pathlib.Path:
    """The volume of this texture, made where it is not there."""
    texture = _TEXTURE.value or "noise"
    name = hashlib.sha256(texture.encode()).hexdigest()[:12]
    path = files.make_folder(_FOLDER.value) / f"{name}.n5"
    if path.exists():
        return path
    print(f"making {path} of {texture}", file=sys.stderr, flush=True)
    if _TEXTURE.value:
        source = volumes.open(_TEXTURE.value)
        tile = source.read((0, 0, 0), np.minimum(source.shape_zyx, _SHAPE_ZYX))
    else:
        tile = _noise()
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Zeros that take no memory and that TensorStore does not store; then the slabs.
    zeros = np.broadcast_to(np.uint8(0), _SHAPE_ZYX)
    volumes.write_n5(partial, zeros, _VOXEL_SIZE_NM_ZYX, chunk_shape_zyx=_CHUNK_ZYX)
    kvstore = {"driver": "file", "path": f"{partial}/"}
    store = ts.open({"driver": "n5", "kvstore": kvstore}).result().T
    rows, columns = (np.arange(_SHAPE_ZYX[a]) % tile.shape[a] for a in (1, 2))
    for z in range(0, _SHAPE_ZYX[0], _CHUNK_ZYX[0]):
        sections = np.arange(z, z + _CHUNK_ZYX[0]) % tile.shape[0]
        slab = tile[np.ix_(sections, rows, columns)]
        store[z : z + len(slab)].write(slab).result()
    partial.rename(path)
    return path


def _noise() -> np.ndarray:
    """A texture of blobs some voxels wide, uint8 [z, y, x], that tiles seamlessly."""
    values = np.random.default_rng(0).standard_normal((32, 512, 512), np.float32)
    smooth = ndimage.gaussian_filter(values, (1, 3, 3), mode="wrap")
    smooth = 128 + 40 * smooth / smooth.std()
    return np.clip(smooth, 0, 255).astype(np.uint8)


def _bytes_on_disk(path: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


if __name__ == "__main__":
    command.run(main)
