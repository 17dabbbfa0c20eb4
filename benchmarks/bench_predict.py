# SPDX-License-Identifier: Apache-2.0
"""Crops a second of the network alone: ours, and PyTorch's as written and tuned.

    python benchmarks/bench_predict.py --folder=FOLDER [--config=configs/skeleton.py] \
        [--rounds=5] [--batches=2] [--allocator=default --allocator=huge]

Every side has the same weights and gets the same batch of random uint8 crops from
NumPy, one batch after the other, and gives probabilities in NumPy. `ours` is the
Classifier that synister_jax.predict runs. What PyTorch's sides do is in torch_sides.py:
`as_written` as the original's prediction loop, `inference_mode` the same without
recording for gradients, `tuned` the best that we know. Each side is a process of its
own, idle when it is not its turn, with as many threads as there are CPUs. With the
allocator "huge" glibc asks for pages of 2 MB (side_by_side.py). The sides'
probabilities must agree. Prints one line of JSON.
"""

import contextlib
import json
import subprocess
import time
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

_FOLDER = flags.DEFINE_string(
    "folder", None, "Where our run of the weights is, or is made.", required=True
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 2, "Of a round.", lower_bound=1)
_ALLOCATORS = flags.DEFINE_multi_enum(
    "allocator", list(side_by_side.ALLOCATORS), list(side_by_side.ALLOCATORS), "Whose."
)
_SIDE = flags.DEFINE_string("side", None, "What this process is: for the script.")

_SIDES = ("ours", "as_written", "inference_mode", "tuned")


def main() -> None:
    if _SIDE.value is not None:
        _be(_SIDE.value)
        return
    config = _CONFIG.value
    subprocess.run(side_by_side.own_command("--side=make"), check=True)
    allocators, differences = {}, {}
    for allocator in dict.fromkeys(_ALLOCATORS.value):
        with contextlib.ExitStack() as stack:
            environment = side_by_side.ALLOCATORS[allocator]
            children = {
                name: stack.enter_context(
                    Child(side_by_side.own_command(f"--side={name}"), environment)
                )
                for name in _SIDES
            }
            found = {name: child.ask("classify") for name, child in children.items()}
            differences |= _differences(found, config.compute_dtype)
            measured = side_by_side.compare(children, _ROUNDS.value, "ours")
            measured["sides"] = {n: child.ask("about") for n, child in children.items()}
            allocators[allocator] = measured
    flops = peaks.flops_per_crop(config)["forward"]
    for measured in allocators.values():
        measured |= peaks.utilisation(measured["rates"], flops, config.compute_dtype)
    report = {
        "benchmark": "predict",
        "unit": "crops/s",
        "allocators": allocators,
        "largest_difference": differences,
        "batch_size": config.batch_size,
        "batches": _BATCHES.value,
        "rounds": _ROUNDS.value,
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "parameters": peaks.parameters(config),
        "compute_dtype": config.compute_dtype,
    }
    report |= side_by_side.about("synister_jax", "jax", "jaxlib", "torch", "numpy")
    print(json.dumps(report))


def _be(side: str) -> None:
    config = _CONFIG.value
    folder = files.make_folder(_FOLDER.value)
    shape = (config.batch_size, *config.crop_shape_zyx)
    crops = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    about: dict[str, Any] = {}
    if side == "ours":
        from synister_jax.network import inference, sharding

        workdir = random_inputs.workdir(folder, config, "torch-run")
        mesh = sharding.make_mesh()
        classify = inference.Classifier([(workdir, None)], config.batch_size, mesh)
    else:
        import torch_sides

        if side == "make":
            torch_sides.workdir(folder, config)
            return
        classify, about = torch_sides.predict(side, config, crops)

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(_BATCHES.value):
            classify(crops)
        seconds = time.perf_counter() - start
        return _BATCHES.value * len(crops) / seconds

    side_by_side.serve(
        {
            "round": one_round,
            "classify": lambda: classify(crops).tolist(),
            "about": lambda: about,
        }
    )


def _differences(found: dict[str, list], dtype: str) -> dict[str, float]:
    """The largest difference of a probability from ours, of every other side."""
    ours = np.array(found.pop("ours"))
    differences = {
        name: float(np.abs(np.array(values) - ours).max())
        for name, values in found.items()
    }
    # On tensor cores, and in bfloat16, products are rounded.
    is_exact = dtype == "float32" and side_by_side.about()["backend"] == "cpu"
    limit = 1e-4 if is_exact else 0.05
    for name, difference in differences.items():
        if not difference <= limit:
            raise UserError(f"{name} differs from ours by {difference:.2g}")
    return differences


if __name__ == "__main__":
    command.run(main)
