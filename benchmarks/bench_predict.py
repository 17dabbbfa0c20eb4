# SPDX-License-Identifier: Apache-2.0
r"""Measures the crops per second of the network alone, ours and three in PyTorch.

    python -m benchmarks.bench_predict --folder=FOLDER --config=configs/skeleton.py \
        --rounds=5 --batches=2

All sides have the same weights. They get the same batch of random uint8 crops as a
NumPy array, one batch after the other, and return probabilities as a NumPy array. The
probabilities must agree. `ours` is the Classifier that synister_jax.predict runs.
torch_sides.py describes the other sides. Each side runs in a process of its own, which
waits until its turn, with as many threads as there are CPUs. Both allocators of
side_by_side.py are measured.
"""

import numpy as np

from benchmarks import command_line, made_inputs, our_sides, peaks, side_by_side
from synister_jax.base import command

_BATCHES = command_line.define_count("batches", 2, "Predict this many batches a round.")

_SIDES = {name: name for name in ("ours", "as_written", "inference_mode", "tuned")}


def compare() -> None:
    config = command_line.CONFIG.value
    flops, dtype = peaks.flops_per_crop(config)["forward"], config.compute_dtype
    allocators, differences = {}, {}
    for allocator in side_by_side.ALLOCATORS:
        measured = side_by_side.compare_children(
            _SIDES, command_line.ROUNDS.value, allocator, ("classify", "sides")
        )
        found = {n: np.array(values) for n, values in measured.pop("classify").items()}
        ours = found.pop("ours")
        for name, theirs in found.items():
            differences[name] = our_sides.check_agreement(ours, theirs, dtype)
        measured |= peaks.utilisation(measured["rates"], flops, dtype)
        allocators[allocator] = measured
    report = {"allocators": allocators, "largest_difference": differences}
    report["batches"] = _BATCHES.value
    command_line.print_report("predict", "crops/s", report, config)


def be(side: str) -> None:
    config = command_line.CONFIG.value
    crops, _ = made_inputs.batch(made_inputs.unaugmented(config))
    about = {}
    if side == "ours":
        classify = our_sides.classifier(config.batch_size)
    else:
        from benchmarks import torch_sides

        classify, about = torch_sides.predict(side, config, crops)

    one_round = side_by_side.rate(lambda: classify(crops), len(crops), _BATCHES.value)
    answers = {"classify": lambda: classify(crops).tolist(), "sides": lambda: about}
    side_by_side.serve({side: one_round} | answers)


if __name__ == "__main__":
    command.run(lambda: command_line.run_with_torch(compare, be))
