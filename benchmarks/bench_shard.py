# SPDX-License-Identifier: Apache-2.0
"""Cutting shards, and reading training batches of them.

    python benchmarks/bench_shard.py --folder=FOLDER [--texture=URI] [--rounds=5]

The volume (N5, gzip, chunks of 16×128×128) is `--texture` tiled, or smooth noise;
synapses lie uniformly at random where the whole record, crop and margin, is inside.
Files are in the system's cache: no disk is measured. Prints one line of JSON:

cut: `cutting.write` (all of it: order, reading with an empty cache of 1 GiB, records,
checksums, index) against one read a synapse in the table's order, without a cache of
chunks, as the original reads its crops. Both write records with the same options and
sync the file; the loop cuts another `--sample` of the synapses each round. Its last
records are compared with those in the shards. Bytes decoded are the chunks that
TensorStore read, those needed the union of the chunks under the records.

stream: examples a second of `TrainBatches.stream` over the shards of `cut`, whose
consumer does nothing else, for other numbers of threads and of waiting batches than
data.py has.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import grain
import jax
import ml_collections
import numpy as np
import random_inputs
import side_by_side
import textures
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import config_flags

from synister_jax.base import command, files
from synister_jax.em import crops, volumes
from synister_jax.network import sharding
from synister_jax.tables import synapses
from synister_jax.training import augment, cutting, data, shards

_FOLDER = flags.DEFINE_string("folder", None, "Where it all is made.", required=True)
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_TEXTURE = flags.DEFINE_string("texture", None, "Volume to tile; without it, noise.")
_SHAPE = flags.DEFINE_list(
    "volume_shape_zyx", ["64", "2048", "2048"], "Voxels of the volume."
)
_CROPS = flags.DEFINE_integer("crops", 500, "Synapses in the shards.", lower_bound=1)
_SAMPLE = flags.DEFINE_integer(
    "sample", 50, "Synapses that the loop cuts in a round.", lower_bound=1
)
_BATCHES = flags.DEFINE_integer(
    "batches", 20, "Of a round of the stream.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)

_STREAM_THREADS, _STREAM_BUFFERS = (1, 2, 4, 8), (2, 4, 8)


def main() -> None:
    config = _CONFIG.value
    folder = files.make_folder(_FOLDER.value)
    shape = tuple(map(int, _SHAPE.value))
    texture = textures.load(_TEXTURE.value, shape, (1, 1, 1))
    voxel_size_nm_zyx = tuple(config.voxel_size_nm_zyx)
    path = textures.tiled(folder, texture, shape, voxel_size_nm_zyx)
    with contextlib.redirect_stdout(sys.stderr):  # progress; stdout is for JSON
        cut = _cut(folder, path, config)
        stream = _stream(folder, config)
    report = {
        "benchmark": "shard",
        "cut": cut,
        "stream": stream,
        "rounds": _ROUNDS.value,
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "record_shape_zyx": random_inputs.record_shape_zyx(config),
        "volume_shape_zyx": shape,
        "texture": _TEXTURE.value or "noise",
        "texture_shape_zyx": texture.shape,
    }
    packages = ("synister_jax", "array_record", "grain", "tensorstore", "numpy", "jax")
    print(json.dumps(report | side_by_side.about(*packages)))


# ------------------------------------------------------------------------------ cutting


def _cut(
    folder: pathlib.Path, path: pathlib.Path, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    volume = volumes.open(str(path), config.voxel_size_nm_zyx)
    table = random_inputs.training_synapses(volume, config, _CROPS.value)
    shape = random_inputs.record_shape_zyx(config)
    starts = crops.starts_vx_zyx(
        synapses.positions_nm_zyx(table), config.crop_shape_zyx, volume
    ) - np.asarray(augment.Settings.of(config).margin_vx_zyx)
    ids = table["synapse_id"].to_numpy()
    decoded: dict[str, list[float]] = {"chunk_order": [], "loop": []}
    samples = itertools.count()
    last: dict[int, np.ndarray] = {}

    def chunk_order() -> float:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        start, chunks = time.perf_counter(), textures.chunks_read()
        cutting.write(
            folder / "shards",
            table,
            volumes.open(str(path), config.voxel_size_nm_zyx),
            crop_shape_zyx=config.crop_shape_zyx,
            margin_vx_zyx=augment.Settings.of(config).margin_vx_zyx,
            classes=config.classes,
        )
        seconds = time.perf_counter() - start
        decoded["chunk_order"].append((textures.chunks_read() - chunks) / needed)
        return len(table) / seconds

    def loop() -> float:
        first = next(samples) * _SAMPLE.value
        rows = np.arange(first, first + _SAMPLE.value) % len(table)
        last.clear()
        start, chunks = time.perf_counter(), textures.chunks_read()
        opened = volumes.open(str(path), config.voxel_size_nm_zyx, cache_bytes=0)
        target = folder / "loop.array_record"
        # The same options: what differs is how the voxels are read.
        writer = ArrayRecordWriter(str(target), cutting._WRITER_OPTIONS)
        for row in rows:
            record = opened.read(starts[row], starts[row] + shape)
            writer.write(shards.encode(int(ids[row]), record))
            last[int(ids[row])] = record
        writer.close()
        with target.open("rb+") as file:
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        # Of the loop only a sample is cut: what it would decode for all.
        of_all = (textures.chunks_read() - chunks) / len(rows) * len(table)
        decoded["loop"].append(of_all / needed)
        return len(rows) / seconds

    needed = crops.count_chunks(starts, shape, volume)
    sides = {"chunk_order": chunk_order, "loop": loop}
    rates = side_by_side.alternate(sides, _ROUNDS.value)
    compared = _compare(shards.open(folder / "shards"), last)
    manifest = files.read_json(folder / "shards" / "manifest.json")
    return {
        **side_by_side.summary(rates, "chunk_order"),
        "decoded_over_needed": {
            name: statistics.median(values) for name, values in decoded.items()
        },
        "needed_mib": needed * math.prod(volume.chunk_shape_zyx) / 2**20,
        "crops": len(table),
        "loop_sample": _SAMPLE.value,
        "records_compared": compared,
        "shards": len(manifest["shards"]),
        "shards_mib": sum(shard["bytes"] for shard in manifest["shards"]) / 2**20,
    }


def _compare(cut: shards.Shards, others: dict[int, np.ndarray]) -> int:
    """How many records were compared; one that differs raises."""
    compared = 0
    for record in cut.source():
        synapse_id, crop = cut.decode(record)
        if synapse_id in others:
            np.testing.assert_array_equal(crop, others[synapse_id])
            compared += 1
    assert compared == len(others), (compared, len(others))
    return compared


# ------------------------------------------------------------------------------- stream


def _stream(folder: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Any]:
    examples = data.TrainBatches.of(shards.open(folder / "shards"), config)
    placed = sharding.batch(sharding.make_mesh())

    def streaming(options: grain.ReadOptions) -> Callable[[], float]:
        def stream() -> float:
            # A constant of the package: nobody but this benchmark needs to choose it.
            with mock.patch.object(data, "_READ", options):
                iterator = examples.stream(0, placed)
            start = time.perf_counter()
            with contextlib.closing(iterator):
                for _ in range(_BATCHES.value):
                    jax.block_until_ready(next(iterator))
                seconds = time.perf_counter() - start
            return _BATCHES.value * examples.batch_size / seconds

        return stream

    choices = list(itertools.product(_STREAM_THREADS, _STREAM_BUFFERS))
    sides = {
        f"{threads} threads, {buffer} batches": streaming(
            grain.ReadOptions(threads, buffer)
        )
        for threads, buffer in choices
    }
    rates = side_by_side.alternate(sides, _ROUNDS.value)
    return {
        "examples_per_second": [
            {"threads": threads, "buffer": buffer, "median": statistics.median(values)}
            for (threads, buffer), values in zip(choices, rates.values(), strict=True)
        ],
        "in_data_py": {
            "threads": data._READ.num_threads,
            "buffer": data._READ.prefetch_buffer_size,
        },
        "batch_size": examples.batch_size,
        "batches": _BATCHES.value,
    }


if __name__ == "__main__":
    command.run(main)
