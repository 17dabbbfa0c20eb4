# SPDX-License-Identifier: Apache-2.0
"""Measures how fast shards are cut and read, and compares codecs of records.

    python -m benchmarks.bench_shard --folder=FOLDER --texture=URI --rounds=5

The volume is N5 (gzip, chunks of 16×128×128). It repeats the `--texture`, or smooth
noise, which compresses better than EM. The synapses are at uniformly random positions.
All files are in the cache of the operating system, so no disk is measured. The program
measures three things:

- cut: `cutting.write`, with checksums and index, is compared with a loop. The loop does
  one read per synapse without a cache of chunks, as the original reads its crops. Both
  write records with the same options and sync the file. The records of the last round
  of the loop must equal those of the shards.
- stream: the training examples per second of `TrainBatches.stream` over these shards.
  The consumer does nothing but wait. Several numbers of threads and of waiting batches
  are compared.
- codecs: the bytes of a record, and the records written and read per second, in random
  order. The records are boxes at random places of the texture. Every record is
  compared with its box.
"""

import contextlib
import functools
import itertools
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks import chunk_order, command_line, made_inputs, side_by_side
from synister_jax.base import command, files
from synister_jax.em import crops, volumes
from synister_jax.network import sharding
from synister_jax.tables import synapses
from synister_jax.training import cutting, input_pipeline, shards

_TEXTURE = command_line.define_texture()
_CROPS = command_line.define_count(
    "crops", 500, "Cut the records of this many synapses."
)
_SAMPLE = command_line.define_count(
    "sample", 50, "Cut this many records in a round of the loop."
)
_BATCHES = command_line.define_count(
    "batches", 20, "Read this many batches in a round of the stream."
)
_RECORDS = command_line.define_count(
    "records", 200, "Write this many records with each codec."
)
_STREAM_THREADS, _STREAM_BUFFERS = (1, 2, 4, 8), (2, 4, 8)
_CODECS = ("uncompressed", "zstd:1", "zstd:3")
_READ_THREADS = (1, 2, 4)
_FILES = 8  # more files than threads, because Grain has one reader per file


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for JSON only
        report = {"cut": _cut(), "stream": _stream(), "codecs": _codecs()}
    config = command_line.CONFIG.value
    report["record_shape_zyx"] = made_inputs.record_shape_zyx(config)
    report["texture"] = _TEXTURE.value or "noise"
    command_line.print_report("shard", "records/s", report, config)


def _cut() -> dict[str, Any]:
    config, folder = command_line.CONFIG.value, command_line.folder()
    voxel_size = config.voxel_size_nm_zyx
    path = made_inputs.tiled_volume(
        folder, _TEXTURE.value, made_inputs.LARGE_ZYX, voxel_size
    )
    volume = volumes.open(str(path), voxel_size)
    table = made_inputs.synapses(volume, config, _CROPS.value)
    shape = made_inputs.record_shape_zyx(config)
    positions = synapses.positions_nm_zyx(table)
    starts = crops.starts_vx_zyx(positions, config.crop_shape_zyx, volume)
    starts -= np.asarray(made_inputs.margin_vx_zyx(config))
    ids = table["synapse_id"].to_numpy()
    last: dict[int, np.ndarray] = {}

    def cut_one_by_one(rows: np.ndarray) -> None:
        last.clear()
        opened = volumes.open(str(path), voxel_size, cache_bytes=0)
        target = folder / "loop.array_record"
        # The options are those of the shards, so only the reading of voxels differs.
        writer = ArrayRecordWriter(str(target), cutting._WRITER_OPTIONS)
        for row in rows:
            record = opened.read(starts[row], starts[row] + shape)
            writer.write(shards.encode(int(ids[row]), record))
            last[int(ids[row])] = record
        writer.close()
        with target.open("rb+") as file:
            os.fsync(file.fileno())

    def cut_all() -> None:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        opened = volumes.open(str(path), voxel_size)
        made_inputs.cut_shards(folder / "shards", table, opened, config)

    found = chunk_order.compare(
        volume, starts, shape, cut_all, cut_one_by_one, _SAMPLE.value
    )
    _check(shards.open(folder / "shards"), last)
    manifest = files.read_json(folder / "shards" / "manifest.json")
    found["shards_mib"] = sum(shard["bytes"] for shard in manifest["shards"]) / 2**20
    return found


def _check(cut: shards.Shards, others: dict[int, np.ndarray]) -> None:
    """Raises if a record that was cut in the loop differs from that of the shards."""
    cropped = dict(map(cut.decode, cut.source()))
    for synapse_id, record in others.items():
        np.testing.assert_array_equal(cropped[synapse_id], record)


def _stream() -> dict[str, Any]:
    opened = shards.open(command_line.folder() / "shards")
    examples = input_pipeline.TrainBatches.of(opened, command_line.CONFIG.value)
    placed = sharding.batch(sharding.make_mesh())

    def stream(options: grain.ReadOptions) -> float:
        # The package has no option for this constant, because only this benchmark needs
        # other values.
        with mock.patch.object(input_pipeline, "_READ", options):
            iterator = examples.stream(0, placed)
        start = time.perf_counter()
        with contextlib.closing(iterator):
            for _ in range(_BATCHES.value):
                jax.block_until_ready(next(iterator))
            seconds = time.perf_counter() - start
        return _BATCHES.value * examples.batch_size / seconds

    choices = list(itertools.product(_STREAM_THREADS, _STREAM_BUFFERS))
    sides = {
        f"{threads} threads, {buffer} batches": functools.partial(
            stream, grain.ReadOptions(threads, buffer)
        )
        for threads, buffer in choices
    }
    rates = side_by_side.alternate(sides, command_line.ROUNDS.value)
    return {
        "examples_per_second": [
            {"threads": threads, "buffer": buffer, "median": statistics.median(values)}
            for (threads, buffer), values in zip(choices, rates.values(), strict=True)
        ],
        "in_data_py": {  # this key has the name that results.json uses
            "threads": input_pipeline._READ.num_threads,
            "buffer": input_pipeline._READ.prefetch_buffer_size,
        },
        "batches": _BATCHES.value,
    }


def _codecs() -> list[dict[str, Any]]:
    """Returns the results for each kind of record and each codec."""
    config = command_line.CONFIG.value
    record = made_inputs.record_shape_zyx(config)
    # The texture is not repeated, because repeated sections would compress too well.
    texture = made_inputs.texture(_TEXTURE.value, made_inputs.SMALL_ZYX, record)
    points = []
    for kind, shape in (("whole", record), ("no margin", tuple(config.crop_shape_zyx))):
        starts = made_inputs.random_starts(texture.shape, shape, _RECORDS.value)
        records = [texture[volumes.box_of(start, start + shape)] for start in starts]
        points += [{"record": kind} | point for point in _of_records(records)]
    return points


def _of_records(records: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    shape, rng = records[0].shape, np.random.default_rng(1)
    folder = files.make_folder(command_line.folder() / "codecs")
    paths = {
        codec: [str(folder / f"{codec}-{i}".replace(":", "")) for i in range(_FILES)]
        for codec in _CODECS
    }

    def write(codec: str) -> float:
        start = time.perf_counter()
        for i, path in enumerate(paths[codec]):
            writer = ArrayRecordWriter(path, f"group_size:1,{codec}")
            for number in range(i, len(records), _FILES):
                writer.write(shards.encode(number, records[number]))
            writer.close()
        return len(records) / (time.perf_counter() - start)

    def read(codec: str, threads: int, compares: bool = False) -> float:
        source = grain.sources.ArrayRecordDataSource(paths[codec])
        dataset = grain.MapDataset.source(rng.permutation(len(records)))
        decoded = dataset.map(lambda row: shards.decode(source[int(row)], shape))
        options = grain.ReadOptions(threads, prefetch_buffer_size=2 * threads)
        iterator = iter(decoded.to_iter_dataset(options))
        start, count = time.perf_counter(), 0
        with contextlib.closing(iterator):
            for number, voxels in iterator:
                part = ... if compares else (0, 0)
                assert (voxels[part] == records[number][part]).all(), codec
                count += 1
        assert count == len(records), codec
        return len(records) / (time.perf_counter() - start)

    rounds = command_line.ROUNDS.value
    writing = {codec: functools.partial(write, codec) for codec in _CODECS}
    written = side_by_side.medians(side_by_side.alternate(writing, rounds))
    for codec in _CODECS:
        read(codec, 1, compares=True)
    reading = {
        f"{codec}, {threads} threads": functools.partial(read, codec, threads)
        for codec, threads in itertools.product(_CODECS, _READ_THREADS)
    }
    found = side_by_side.medians(side_by_side.alternate(reading, rounds))
    points = []
    for codec in _CODECS:
        stored = sum(os.path.getsize(path) for path in paths[codec]) / len(records)
        point = {"codec": codec, "raw_bytes": math.prod(shape), "bytes": stored}
        point["written/s"] = written[codec]
        for threads in _READ_THREADS:
            key = f"{codec}, {threads} threads"
            point[f"read/s, {threads} threads"] = found[key]
        points.append(point)
    return points


if __name__ == "__main__":
    command.run(main)
