# SPDX-License-Identifier: Apache-2.0
"""Synapses a second from a volume to predictions: ours, and the original's loop.

    python benchmarks/bench_end_to_end.py --folder=FOLDER \
        [--config=configs/skeleton.py] [--synapses=32] [--batch_size=8] [--rounds=5] \
        [--allocator=default --allocator=huge]

The volume (N5, gzip, chunks of 16×128×128, smooth noise) has the synapses uniformly
random in it. `ours` is a whole prediction with the network loaded: plan, execution with
nothing in the volume's cache, predictions.feather merged. `original` reads the crop of
one synapse after the other, in the table's order and without a cache, stacks a batch,
predicts it with PyTorch as written (torch_sides.py: gradients recorded), and appends
the probabilities to a list. It is spared what the original does besides: a query and an
update of MongoDB for every synapse; and it reads through TensorStore, where the
original has daisy and zarr, which are not faster. Both have the same weights and must
find the same probabilities; each is a process of its own, idle when it is not its turn.
With the allocator "huge" glibc asks for pages of 2 MB (side_by_side.py).
The volume lies in the system's cache. Prints one line of JSON.
"""

import contextlib
import json
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import peaks
import random_inputs
import side_by_side
from absl import flags
from ml_collections import config_flags
from side_by_side import Child

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.em import crops, volumes

_FOLDER = flags.DEFINE_string(
    "folder", None, "Where network and volume are, or are made.", required=True
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_SYNAPSES = flags.DEFINE_integer("synapses", 32, "Of a round.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Crops at once.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)
_SHAPE = flags.DEFINE_list(
    "volume_shape_zyx", ["64", "1024", "1024"], "Voxels of the volume."
)
_ALLOCATORS = flags.DEFINE_multi_enum(
    "allocator", list(side_by_side.ALLOCATORS), list(side_by_side.ALLOCATORS), "Whose."
)
_SIDE = flags.DEFINE_string("side", None, "What this process is: for the script.")

_SIDES = ("ours", "original")


def main() -> None:
    if _SIDE.value is not None:
        _be(_SIDE.value)
        return
    config = _CONFIG.value
    subprocess.run(side_by_side.own_command("--side=make"), check=True)
    allocators, differences = {}, []
    for allocator in dict.fromkeys(_ALLOCATORS.value):
        with contextlib.ExitStack() as stack:
            children = {
                name: stack.enter_context(
                    Child(
                        side_by_side.own_command(f"--side={name}"),
                        side_by_side.ALLOCATORS[allocator],
                    )
                )
                for name in _SIDES
            }
            measured = side_by_side.compare(children, _ROUNDS.value, "ours")
            ours, theirs = (np.array(child.ask("found")) for child in children.values())
        differences.append(float(np.abs(ours - theirs).max()))
        allocators[allocator] = measured
    report = side_by_side.about(
        "synister_jax", "jax", "jaxlib", "tensorstore", "torch", "numpy"
    )
    # On tensor cores, and in bfloat16, products are rounded.
    is_exact = config.compute_dtype == "float32" and report["backend"] == "cpu"
    if not max(differences) <= (1e-4 if is_exact else 0.05):
        raise UserError(f"the sides' probabilities differ by {max(differences):.2g}")
    report = {
        "benchmark": "end_to_end",
        "unit": "synapses/s",
        "allocators": allocators,
        "largest_difference": max(differences),
        "synapses": _SYNAPSES.value,
        "batch_size": _BATCH_SIZE.value,
        "rounds": _ROUNDS.value,
        "volume_shape_zyx": list(map(int, _SHAPE.value)),
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "parameters": peaks.parameters(config),
        "compute_dtype": config.compute_dtype,
    } | report
    print(json.dumps(report))


def _be(side: str) -> None:
    folder = files.make_folder(_FOLDER.value)
    path = random_inputs.volume_path(
        folder, list(map(int, _SHAPE.value)), _CONFIG.value
    )
    if side == "make":
        import torch_sides

        torch_sides.workdir(folder, _CONFIG.value)
        return
    predict = _ours(folder, path) if side == "ours" else _original(path)
    found = np.zeros(0)

    def one_round() -> float:
        nonlocal found
        start = time.perf_counter()
        found = predict()
        return _SYNAPSES.value / (time.perf_counter() - start)

    side_by_side.serve({"round": one_round, "found": lambda: found.tolist()})


def _ours(folder: pathlib.Path, path: pathlib.Path) -> Callable[[], np.ndarray]:
    from pyarrow import feather

    from synister_jax import predict
    from synister_jax.bulk import execution
    from synister_jax.network import inference, sharding
    from synister_jax.tables import predictions
    from synister_jax.tables.batches import Source

    config = _CONFIG.value
    workdir = random_inputs.workdir(folder, config, "torch-run")
    mesh = sharding.make_mesh()
    classifier = inference.Classifier([(workdir, None)], _BATCH_SIZE.value, mesh)
    output = folder / "output"

    def run() -> np.ndarray:
        volume = volumes.open(str(path), config.voxel_size_nm_zyx)
        synapses = random_inputs.synapses(volume, config, _SYNAPSES.value)
        source = Source("random synapses", lambda: iter([synapses]))
        shutil.rmtree(output, ignore_errors=True)
        plan = predict.make_plan(classifier, source, volume, output)
        execution.execute(plan, range(len(plan)), classifier, volume)
        predict.finish(plan, classifier, source, volume)
        table = feather.read_table(output / "predictions.feather", memory_map=False)
        return predictions.probabilities(table.combine_chunks())

    return run


def _original(path: pathlib.Path) -> Callable[[], np.ndarray]:
    import torch_sides

    config = _CONFIG.value
    shape = tuple(config.crop_shape_zyx)
    warm_up = np.zeros((_BATCH_SIZE.value, *shape), np.uint8)
    classify, _ = torch_sides.predict("as_written", config, warm_up)

    def run() -> np.ndarray:
        volume = volumes.open(str(path), config.voxel_size_nm_zyx, cache_bytes=0)
        synapses = random_inputs.synapses(volume, config, _SYNAPSES.value)
        nm = np.stack([synapses[f"{axis}_nm"].to_numpy() for axis in "zyx"], axis=1)
        starts = crops.starts_vx_zyx(nm, shape, volume)
        found: list[Any] = []
        for first in range(0, len(starts), _BATCH_SIZE.value):
            batch = [
                volume.read(start, start + shape)
                for start in starts[first : first + _BATCH_SIZE.value]
            ]
            found.extend(classify(np.stack(batch)).tolist())
        return np.array(found)

    return run


if __name__ == "__main__":
    command.run(main)
