# SPDX-License-Identifier: Apache-2.0
r"""Measures the crops per second of a training step, ours and two in PyTorch.

    python -m benchmarks.bench_train --folder=FOLDER --config=configs/skeleton.py \
        --rounds=5 --steps=1

A step has a forward pass with dropout and batch statistics, a backward pass, and the
update of all parameters by Adam. Every step uses the same batch of random crops.
Nothing is augmented. Our step gets uint8 crops on the device, and scales them. PyTorch
gets scaled crops (torch_sides.py).

All sides begin with the same weights. With `--config.model.dropout=0`, the losses of
the first steps must agree. Each side runs in a process of its own, and needs up to 13
GB. So ours is compared with one other side at a time.
"""

from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks import command_line, made_inputs, our_sides, peaks, side_by_side
from synister_jax.base import command
from synister_jax.base.errors import UserError

_STEPS = command_line.define_count("steps", 1, "Do this many steps in a round.")


def compare() -> None:
    config = command_line.CONFIG.value
    allocators = {
        allocator: {
            other: _compare_with(other, allocator, config)
            for other in ("as_written", "tuned")
        }
        for allocator in side_by_side.ALLOCATORS
    }
    report = {"allocators": allocators, "steps": _STEPS.value}
    report["dropout"] = config.model.dropout
    command_line.print_report("train", "crops/s", report, config)


def _compare_with(
    other: str, allocator: str, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    sides = {"ours": "ours", other: other}
    rounds = command_line.ROUNDS.value
    found = side_by_side.compare_children(sides, rounds, allocator, ("sides",))
    mine, its = (about["first_losses"] for about in found["sides"].values())
    # The second loss comes after an update, which is compared in this way, too. Losses
    # in bfloat16 are not compared, because the sides round differently.
    is_exact = config.model.dropout == 0 and config.compute_dtype == "float32"
    if is_exact and not np.allclose(mine, its, rtol=1e-2):
        raise UserError(f"the first losses differ: ours {mine}, {other} {its}")
    flops = peaks.flops_per_crop(config)["train"]
    return found | peaks.utilisation(found["rates"], flops, config.compute_dtype)


def be(side: str) -> None:
    config = made_inputs.unaugmented(command_line.CONFIG.value)
    config.log_every_steps = 1  # so that every step returns its loss
    about: dict[str, Any] = {}
    if side == "ours":
        network = our_sides.Network(config, workdir=our_sides.torch_run())
        start_step = network.training(config)

        def step() -> float:
            loss = start_step()
            jax.block_until_ready(network.state)
            return float(loss)
    else:
        from benchmarks import torch_sides

        crops, labels = made_inputs.batch(config)
        scaled = crops.astype(np.float32) / 255 * 2 - 1
        step, about = torch_sides.train(side, config, scaled, labels.astype(np.int64))

    if "first_losses" not in about:
        about["first_losses"] = [step(), step()]
    one_round = side_by_side.rate(step, config.batch_size, _STEPS.value)
    side_by_side.serve({side: one_round, "sides": lambda: about})


if __name__ == "__main__":
    command.run(lambda: command_line.run_with_torch(compare, be))
