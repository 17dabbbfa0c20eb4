# SPDX-License-Identifier: Apache-2.0
r"""Measures the share of the augmentation in the time of a training step.

    python -m benchmarks.bench_augmentation --folder=FOLDER \
        --config=configs/skeleton.py --rounds=5

One process measures three programs in turns, on the same random voxels: a step with
augmentation (`augmented`), a step without (`plain`), and only the augmentation
(`alone`).
"""

import jax

from benchmarks import command_line, made_inputs, our_sides, side_by_side
from synister_jax.base import command
from synister_jax.network import convolution
from synister_jax.training import augment


def main() -> None:
    config = command_line.CONFIG.value
    command_line.keep_compiled()
    network = our_sides.Network(config)
    settings = augment.AugmentSettings.of(config)
    augmented = jax.jit(
        lambda records, keys: augment.augment(records, keys, settings),
        compiler_options=convolution.compiler_options(),
    )
    records = jax.device_put(made_inputs.batch(config)[0])
    keys = augment.batch_keys(0, 0, config.batch_size)
    programs = {
        "augmented": network.training(config),
        "plain": network.training(made_inputs.unaugmented(config)),
        "alone": lambda: augmented(records, keys),
    }
    sides = {
        name: side_by_side.rate(program, 1, finish=jax.block_until_ready)
        for name, program in programs.items()
    }
    rates = side_by_side.alternate(sides, command_line.ROUNDS.value)
    found = side_by_side.summary(rates, "augmented")
    seconds = {name: 1 / rate for name, rate in found["rates"].items()}
    report = {
        "seconds": seconds,
        "augmentation_of_step": seconds["alone"] / seconds["augmented"],
        "augmented_over_plain": seconds["augmented"] / seconds["plain"],
    }
    command_line.print_report("augmentation", "steps/s", found | report, config)


if __name__ == "__main__":
    command.run(main)
