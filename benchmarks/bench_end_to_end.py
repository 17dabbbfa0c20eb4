# SPDX-License-Identifier: Apache-2.0
r"""Measures the synapses per second of a whole prediction, ours and the original's.

    python -m benchmarks.bench_end_to_end --folder=FOLDER \
        --config=configs/skeleton.py --synapses=32 --batch_size=8 --rounds=5

The volume is smooth noise (N5, gzip, chunks of 16×128×128), and its files are in the
cache of the operating system. The synapses are at uniformly random positions. Three
sides are measured:

- `ours` is a whole prediction with a network that is loaded already: it makes the plan,
  executes the plan with an empty cache of chunks, and merges predictions.feather.
- `network_alone` is the same network in the same process, with a batch that is already
  on the device. The ratio to it shows the cost of reading, waiting and writing.
- `original` reads one crop after the other without a cache, stacks a batch, predicts
  the batch with PyTorch as written, and appends the probabilities to a list. The
  original does more, which is left out here: it sends a query and an update to MongoDB
  for every synapse. It reads with daisy and zarr. Here TensorStore reads, which is at
  least as fast.

`ours` and `original` have the same weights, and must give the same probabilities. Each
runs in a process of its own.
"""

import collections
import math
import pathlib
import shutil
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from pyarrow import feather

from benchmarks import command_line, made_inputs, our_sides, side_by_side
from synister_jax.base import command
from synister_jax.bulk import execution, merging, planning
from synister_jax.em import crops, volumes
from synister_jax.network import inference
from synister_jax.tables import predictions, synapses
from synister_jax.tables.synapse_stream import SynapseStream

_SYNAPSES = command_line.define_count(
    "synapses", 32, "Predict this many synapses in a round."
)
_BATCH_SIZE = command_line.define_count(
    "batch_size", 8, "Predict this many crops at once."
)


def compare() -> None:
    config = command_line.CONFIG.value
    child_of = {"ours": "ours", "network_alone": "ours", "original": "original"}
    allocators, differences = {}, []
    for allocator in side_by_side.ALLOCATORS:
        measured = side_by_side.compare_children(
            child_of, command_line.ROUNDS.value, allocator, ("found", "device_busy")
        )
        found = (np.array(values) for values in measured.pop("found").values())
        difference = our_sides.check_agreement(*found, config.compute_dtype)
        differences.append(difference)
        measured["device_busy"] = measured["device_busy"]["ours"]
        allocators[allocator] = measured
    report = {"allocators": allocators, "largest_difference": max(differences)}
    report |= {"synapses": _SYNAPSES.value, "batch_size": _BATCH_SIZE.value}
    command_line.print_report("end_to_end", "synapses/s", report, config)


def be(side: str) -> None:
    config, folder = command_line.CONFIG.value, command_line.folder()
    shape, voxel_size = made_inputs.SMALL_ZYX, config.voxel_size_nm_zyx
    path = made_inputs.tiled_volume(folder, None, shape, voxel_size)
    found = np.zeros(0)
    busy: list[float] = []
    functions: dict[str, Callable[[], Any]] = {}
    if side == "ours":
        classifier = our_sides.classifier(_BATCH_SIZE.value)
        predict = _ours(classifier, folder, path, busy)
        functions["network_alone"] = side_by_side.rate(
            _network_alone(classifier), _SYNAPSES.value
        )
    else:
        predict = _original(path)

    def run() -> None:
        nonlocal found
        found = predict()

    functions[side] = side_by_side.rate(run, _SYNAPSES.value)
    functions["found"] = lambda: found.tolist()
    functions["device_busy"] = lambda: statistics.median(busy[1:] or [0])
    side_by_side.serve(functions)


def _ours(
    classifier: inference.Classifier,
    folder: pathlib.Path,
    path: pathlib.Path,
    busy: list[float],
) -> Callable[[], np.ndarray]:
    """Returns a function that predicts all synapses and returns their probabilities.

    The function also appends the share of the time that the devices were busy to
    `busy`.
    """
    config = command_line.CONFIG.value
    output = folder / "output"

    def run() -> np.ndarray:
        volume = volumes.open(str(path), config.voxel_size_nm_zyx)
        table = made_inputs.synapses(volume, config, _SYNAPSES.value)
        source = SynapseStream("random synapses", lambda: iter(table.to_batches()))
        shutil.rmtree(output, ignore_errors=True)
        plan = planning.of_classifier(classifier, source, volume, output)
        times = execution.execute(plan, range(len(plan)), classifier, volume)
        busy.append(times.compute / times.wall)
        merging.finish(plan, classifier, source, volume)
        found = feather.read_table(output / "predictions.feather", memory_map=False)
        return predictions.probabilities(found.combine_chunks())

    return run


def _network_alone(classifier: inference.Classifier) -> Callable[[], None]:
    crop = np.zeros(command_line.CONFIG.value.crop_shape_zyx, np.uint8)
    batch = classifier.put([crop] * classifier.batch_size)

    def run() -> None:
        pending: collections.deque[jax.Array] = collections.deque()
        for _ in range(math.ceil(_SYNAPSES.value / classifier.batch_size)):
            pending.append(classifier.start(batch))
            if len(pending) == 2:
                np.asarray(pending.popleft())
        while pending:
            np.asarray(pending.popleft())

    return run


def _original(path: pathlib.Path) -> Callable[[], np.ndarray]:
    from benchmarks import torch_sides

    config = command_line.CONFIG.value
    shape = tuple(config.crop_shape_zyx)
    warm_up = np.zeros((_BATCH_SIZE.value, *shape), np.uint8)
    classify, _ = torch_sides.predict("as_written", config, warm_up)

    def run() -> np.ndarray:
        volume = volumes.open(str(path), config.voxel_size_nm_zyx, cache_bytes=0)
        table = made_inputs.synapses(volume, config, _SYNAPSES.value)
        positions = synapses.positions_nm_zyx(table)
        starts = crops.starts_vx_zyx(positions, shape, volume)
        found: list[Any] = []
        for first in range(0, len(starts), _BATCH_SIZE.value):
            places = starts[first : first + _BATCH_SIZE.value]
            batch = [volume.read(start, start + shape) for start in places]
            found.extend(classify(np.stack(batch)).tolist())
        return np.array(found)

    return run


if __name__ == "__main__":
    command.run(lambda: command_line.run_with_torch(compare, be))
