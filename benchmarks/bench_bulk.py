# SPDX-License-Identifier: Apache-2.0
"""Crops a second of a whole prediction, and of its network alone.

    python benchmarks/bench_bulk.py --folder=FOLDER [--config=configs/skeleton.py] \
        [--synapses=64] [--batch_size=8] [--rounds=5]

The network has random weights, the volume (N5, gzip, chunks of 16×128×128) is smooth
noise with the synapses uniformly random in it; both stay in the folder for the next
run. The prediction executes a plan with nothing in the volume's cache: it reads and
decodes chunks, computes, and writes parts. The network alone gets as many batches, one
that lies on the device already again and again; like the prediction it fetches each
result while the next batch is computed. The two alternate in one process, as to which
is first too; medians, the ratio of pairs. Prints one line of JSON. Runs on whatever
devices JAX has.
"""

import collections
import json
import math
import os
import pathlib
import shutil
import statistics
import time

import jax
import numpy as np
import peaks
import random_inputs
import side_by_side
from absl import flags
from ml_collections import config_flags

from synister_jax import predict
from synister_jax.base import command, files
from synister_jax.bulk import execution, unit_results
from synister_jax.bulk.planning import Plan
from synister_jax.em import volumes
from synister_jax.network import inference, sharding
from synister_jax.tables.batches import Source

_FOLDER = flags.DEFINE_string(
    "folder", None, "Where network and volume are, or are made.", required=True
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_SYNAPSES = flags.DEFINE_integer("synapses", 64, "Of a round.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Crops at once.", lower_bound=1)
_UNIT_ROWS = flags.DEFINE_integer("unit_rows", 32, "Of a unit.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)
_SHAPE = flags.DEFINE_list(
    "volume_shape_zyx", ["64", "1024", "1024"], "Voxels of the volume."
)


def main() -> None:
    config = _CONFIG.value
    folder = files.make_folder(_FOLDER.value)
    path = random_inputs.volume_path(folder, list(map(int, _SHAPE.value)), config)
    volume = volumes.open(str(path), config.voxel_size_nm_zyx)
    workdir = random_inputs.workdir(folder, config)
    mesh = sharding.make_mesh()
    classifier = inference.Classifier([(workdir, None)], _BATCH_SIZE.value, mesh)
    synapses = random_inputs.synapses(volume, config, _SYNAPSES.value)
    source = Source("random synapses", lambda: iter([synapses]))
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    plan = predict.make_plan(classifier, source, volume, output, _UNIT_ROWS.value)
    batches = sum(
        math.ceil(plan.size(unit) / classifier.batch_size) for unit in range(len(plan))
    )
    voxels = np.zeros((classifier.batch_size, *config.crop_shape_zyx), np.uint8)
    voxels[:] = volume.read((0, 0, 0), config.crop_shape_zyx)
    on_device = classifier.put(voxels)

    load_before = os.getloadavg()
    all_times: list[execution.Times] = []

    def bare() -> float:
        return plan.predicted_rows / _bare(classifier, on_device, batches)

    def whole() -> float:
        all_times.append(_predict(plan, classifier, path))
        return plan.predicted_rows / all_times[-1].wall

    sides = {"bare": bare, "predict": whole}
    rates = side_by_side.alternate(sides, _ROUNDS.value)
    del all_times[0]  # compiles
    report = {
        "benchmark": "bulk",
        "unit": "crops/s",
        **side_by_side.summary(rates, "predict"),
        "device_busy": statistics.median(t.compute / t.wall for t in all_times),
        "seconds_of_a_prediction": {
            stage: statistics.median(getattr(times, stage) for times in all_times)
            for stage in ("read", "put", "compute", "write", "storage", "wall")
        },
        "synapses": plan.predicted_rows,
        "batch_size": classifier.batch_size,
        "batches": batches,
        "units": len(plan),
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "parameters": peaks.parameters(config),
        "compute_dtype": config.compute_dtype,
        "volume_shape_zyx": volume.shape_zyx,
        "chunk_shape_zyx": volume.chunk_shape_zyx,
        "load_average_before": load_before,
    }
    packages = ("synister_jax", "jax", "jaxlib", "tensorstore", "numpy")
    print(json.dumps(report | side_by_side.about(*packages)))


def _bare(classifier: inference.Classifier, batch: jax.Array, batches: int) -> float:
    """Seconds of the network for so many batches, one waiting while one is computed."""
    start = time.perf_counter()
    pending: collections.deque[jax.Array] = collections.deque()
    for _ in range(batches):
        pending.append(classifier.start(batch))
        if len(pending) == 2:
            np.asarray(pending.popleft())
    while pending:
        np.asarray(pending.popleft())
    return time.perf_counter() - start


def _predict(
    plan: Plan, classifier: inference.Classifier, path: pathlib.Path
) -> execution.Times:
    """Times of all units; the chunks that a former round decoded are forgotten."""
    for unit in range(len(plan)):
        unit_results.path_of(plan, unit).unlink(missing_ok=True)
    volume = volumes.open(str(path), classifier.config.voxel_size_nm_zyx)
    return execution.execute(plan, range(len(plan)), classifier, volume)


if __name__ == "__main__":
    command.run(main)
