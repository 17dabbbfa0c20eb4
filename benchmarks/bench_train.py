# SPDX-License-Identifier: Apache-2.0
"""Crops a second of a training step: ours, and PyTorch's as written and tuned.

    python benchmarks/bench_train.py --folder=FOLDER [--config=configs/skeleton.py] \
        [--rounds=5] [--steps=1] [--allocator=default --allocator=huge]

A step is forward with dropout and batch statistics, backward, and Adam's update of all
parameters, on one batch of random crops again and again. Nothing is augmented: ours is
`train.train_step` with every augmentation off, of uint8 crops that lie on the device,
and so includes that they are scaled; PyTorch's get them scaled. What these do is in
torch_sides.py: `as_written` as the original trains, `tuned` the best that we know. All
start from the same weights; the first losses are in the report, and must agree where
`--config.model.dropout=0`.

Each side is a process of its own, idle when it is not its turn. With the allocator
"huge" glibc asks for pages of 2 MB (side_by_side.py). At full size a side has up to
13 GB in a step: ours alternates with one other at a time. Prints one line of JSON.
"""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import ml_collections
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
_STEPS = flags.DEFINE_integer("steps", 1, "Of a round.", lower_bound=1)
_ALLOCATORS = flags.DEFINE_multi_enum(
    "allocator", list(side_by_side.ALLOCATORS), list(side_by_side.ALLOCATORS), "Whose."
)
_SIDE = flags.DEFINE_string("side", None, "What this process is: for the script.")

_OTHERS = ("as_written", "tuned")


def main() -> None:
    config = random_inputs.unaugmented(_CONFIG.value)
    config.log_every_steps = 1  # the loss of every step by itself
    if _SIDE.value is not None:
        _be(_SIDE.value, config)
        return
    subprocess.run(side_by_side.own_command("--side=make"), check=True)
    flops = peaks.flops_per_crop(config)["train"]
    allocators = {
        allocator: {other: _compare(other, allocator, config) for other in _OTHERS}
        for allocator in dict.fromkeys(_ALLOCATORS.value)
    }
    for pairs in allocators.values():
        for pair in pairs.values():
            pair |= peaks.utilisation(pair["rates"], flops, config.compute_dtype)
    report = {
        "benchmark": "train",
        "unit": "crops/s",
        "allocators": allocators,
        "batch_size": config.batch_size,
        "steps": _STEPS.value,
        "rounds": _ROUNDS.value,
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "parameters": peaks.parameters(config),
        "dropout": config.model.dropout,
        "compute_dtype": config.compute_dtype,
    }
    report |= side_by_side.about(
        "synister_jax", "jax", "jaxlib", "flax", "optax", "torch", "numpy"
    )
    print(json.dumps(report))


def _compare(
    other: str, allocator: str, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Ours and one other side in turns."""
    print(f"allocator {allocator}", file=sys.stderr, flush=True)
    environment = side_by_side.ALLOCATORS[allocator]
    with (
        Child(side_by_side.own_command("--side=ours"), environment) as ours,
        Child(side_by_side.own_command(f"--side={other}"), environment) as theirs,
    ):
        about = {"ours": ours.ask("about"), other: theirs.ask("about")}
        mine, its = (side["first_losses"] for side in about.values())
        # After one update, too; in bfloat16 the losses are rounded otherwise.
        is_exact = config.model.dropout == 0 and config.compute_dtype == "float32"
        if is_exact and not np.allclose(mine, its, rtol=1e-2):
            raise UserError(f"first losses differ: {mine}, {other} {its}")
        children = {"ours": ours, other: theirs}
        measured = side_by_side.compare(children, _ROUNDS.value, "ours")
    return measured | {"sides": about}


def _be(side: str, config: ml_collections.ConfigDict) -> None:
    folder = files.make_folder(_FOLDER.value)
    shape = (config.batch_size, *config.crop_shape_zyx)
    crops = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.arange(config.batch_size) % len(config.classes)
    about: dict[str, Any] = {}
    if side == "ours":
        workdir = random_inputs.workdir(folder, config, "torch-run")
        step, losses = _ours(workdir, config, crops, labels)
    else:
        import torch_sides

        if side == "make":
            torch_sides.workdir(folder, config)
            return
        scaled = crops.astype(np.float32) / 255 * 2 - 1
        step, losses, about = torch_sides.train(side, config, scaled, labels)

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(_STEPS.value):
            step()
        return _STEPS.value * len(crops) / (time.perf_counter() - start)

    about["first_losses"] = losses
    side_by_side.serve({"round": one_round, "about": lambda: about})


def _ours(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    crops: np.ndarray,
    labels: np.ndarray,
) -> tuple[Callable[[], float], list[float]]:
    """A step, and the losses of the first two."""
    import jax

    from synister_jax import train
    from synister_jax.network import checkpoint, inference, model, sharding
    from synister_jax.training import optimisation

    tx = optimisation.make_optimizer(config)
    mesh = sharding.make_mesh()
    where = sharding.replicated(mesh)
    abstract = sharding.abstract(inference.abstract_variables(config), where)
    state = random_inputs.training_state(config, tx, where)
    state = state.replace(params={}, batch_stats={})
    state = state.replace(**checkpoint.load_variables(workdir, 0, abstract, config))
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step_fn = train.jit_step(config, model.from_config(config), tx, placed)
    batch = {"crop": crops, "label": labels.astype(np.int32)}
    batch = jax.device_put(batch, sharding.batch(mesh))

    def step() -> float:
        nonlocal state
        state, numbers = step_fn(state, batch)
        jax.block_until_ready(state)
        return float(numbers["loss"])

    return step, [step(), step()]


if __name__ == "__main__":
    command.run(main)
