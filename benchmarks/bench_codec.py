# SPDX-License-Identifier: Apache-2.0
"""What a record of a shard costs by codec: its bytes, writing it, reading it.

    python benchmarks/bench_codec.py --folder=FOLDER --texture=URI [--rounds=5]

Records are boxes at random places of `--texture`, a volume of real EM; without it, of
smooth noise, which compresses better than EM does. They are measured with the margin
for the augmentation, as shards have it, and without. The same records go into eight
files with each codec, `group_size:1` as Grain wants it; bytes are those of the files.
Reading takes one record at a time in random order, as 1, 2 and 4 threads of Grain,
decompresses and decodes it, and copies nothing. Files are in the system's cache: no
disk is measured. The codecs alternate in one process; medians. Every record is read
back and compared once. Prints one line of JSON.
"""

import contextlib
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
import side_by_side
import textures
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import config_flags

from synister_jax.base import command, files
from synister_jax.em import volumes
from synister_jax.training import augment, cutting, shards

_FOLDER = flags.DEFINE_string("folder", None, "Where it all is made.", required=True)
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_TEXTURE = flags.DEFINE_string("texture", None, "Volume; without it, noise.")
_RECORDS = flags.DEFINE_integer("records", 200, "Of each codec.", lower_bound=8)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)

_CODECS = ("uncompressed", "zstd:1", "zstd:3")
_READ_THREADS = (1, 2, 4)
_FILES = 8  # more than threads: Grain has one reader a file
_AT_MOST_ZYX = (64, 1024, 1024)


def main() -> None:
    config = _CONFIG.value
    folder = files.make_folder(_FOLDER.value)
    crop = tuple(config.crop_shape_zyx)
    margin = augment.Settings.of(config).margin_vx_zyx
    record = shards.record_shape_zyx(crop, margin)
    # Not tiled: a section that came again would compress too well.
    texture = textures.load(_TEXTURE.value, _AT_MOST_ZYX, record)
    kinds = {"with_margin": record, "without_margin": crop}
    report: dict[str, Any] = {"benchmark": "codec"}
    for kind, shape in kinds.items():
        report[kind] = _measure(folder / kind, texture, shape)
    report |= {
        "unit": "records/s",
        "written_now": cutting._WRITER_OPTIONS,
        "files": _FILES,
        "rounds": _ROUNDS.value,
        "texture": _TEXTURE.value or "noise",
        "texture_shape_zyx": texture.shape,
    }
    packages = ("synister_jax", "array_record", "grain", "numpy")
    print(json.dumps(report | side_by_side.about(*packages)))


def _measure(
    folder: pathlib.Path, texture: np.ndarray, shape: Sequence[int]
) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    most = np.subtract(texture.shape, shape)
    starts = rng.integers(0, most, (_RECORDS.value, 3), endpoint=True)
    records = [texture[volumes.box_of(start, start + shape)] for start in starts]
    paths = {
        codec: [
            files.make_folder(folder / codec.replace(":", "")) / f"{i}.array_record"
            for i in range(_FILES)
        ]
        for codec in _CODECS
    }

    def writing(codec: str) -> Callable[[], float]:
        def write() -> float:
            start = time.perf_counter()
            for i, path in enumerate(paths[codec]):
                writer = ArrayRecordWriter(str(path), f"group_size:1,{codec}")
                for number in range(i, len(records), _FILES):
                    writer.write(shards.encode(number, records[number]))
                writer.close()
            return len(records) / (time.perf_counter() - start)

        return write

    def reading(codec: str, threads: int) -> Callable[[], float]:
        def read() -> float:
            order = rng.permutation(len(records))
            source = grain.sources.ArrayRecordDataSource(list(map(str, paths[codec])))
            dataset = grain.MapDataset.source(order)
            decoded = dataset.map(lambda row: shards.decode(source[int(row)], shape))
            options = grain.ReadOptions(threads, prefetch_buffer_size=2 * threads)
            iterator = iter(decoded.to_iter_dataset(options))
            start = time.perf_counter()
            found = 0
            with contextlib.closing(iterator):
                for number, record in iterator:
                    found += bool((record[0, 0] == records[number][0, 0]).all())
            seconds = time.perf_counter() - start
            assert found == len(records), f"{codec}: {found} of {len(records)}"
            return len(records) / seconds

        return read

    written = side_by_side.alternate(
        {codec: writing(codec) for codec in _CODECS}, _ROUNDS.value
    )
    for codec in _CODECS:
        _compare(paths[codec], records, shape)
    sides = list(itertools.product(_CODECS, _READ_THREADS))
    read = side_by_side.alternate(
        {f"{codec}, {n} threads": reading(codec, n) for codec, n in sides},
        _ROUNDS.value,
    )
    raw = math.prod(shape)
    answer: dict[str, Any] = {
        "shape_zyx": shape,
        "raw_bytes": raw,
        "records": len(records),
    }
    for codec in _CODECS:
        stored = sum(path.stat().st_size for path in paths[codec]) / len(records)
        answer[codec] = {
            "bytes_per_record": stored,
            "of_raw": stored / raw,
            "written_per_second": statistics.median(written[codec]),
            "read_per_second": {
                str(n): statistics.median(read[f"{codec}, {n} threads"])
                for n in _READ_THREADS
            },
        }
    return answer


def _compare(
    paths: Sequence[pathlib.Path], records: Sequence[np.ndarray], shape: Sequence[int]
) -> None:
    """Raises where a record is not what was written."""
    source = grain.sources.ArrayRecordDataSource(list(map(str, paths)))
    assert len(source) == len(records)
    for record in source:
        number, voxels = shards.decode(record, shape)
        np.testing.assert_array_equal(voxels, records[number])


if __name__ == "__main__":
    command.run(main)
