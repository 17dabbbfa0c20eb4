# SPDX-License-Identifier: Apache-2.0
"""What the augmentation costs of a training step: with it, and with crops ready made.

    python benchmarks/augmentation_cost.py --config=configs/skeleton.py [--repeats=5]

The two steps alternate in one process, on the same noise; medians. Prints one line of
JSON. Runs on whatever device JAX has.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import random_inputs
import side_by_side
from absl import flags
from ml_collections import config_flags

from synister_jax import train
from synister_jax.base import command
from synister_jax.network import convolution, model, sharding
from synister_jax.training import augment, optimisation

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps of each.", lower_bound=1)


def main() -> None:
    config = _CONFIG.value
    tx = optimisation.make_optimizer(config)
    network = model.from_config(config)
    plain = random_inputs.unaugmented(config)
    steps, batches = {}, {}
    mesh = sharding.make_mesh()
    rng = np.random.default_rng(0)
    for name, chosen in (("augmented", config), ("plain", plain)):
        shape = random_inputs.record_shape_zyx(chosen)
        crops = rng.integers(0, 256, (chosen.batch_size, *shape), dtype=np.uint8)
        labels = np.arange(chosen.batch_size, dtype=np.int32) % len(chosen.classes)
        batch = {"crop": crops, "label": labels}
        batches[name] = jax.device_put(batch, sharding.batch(mesh))
    settings = augment.Settings.of(config)
    alone = jax.jit(
        lambda r, k: augment.augment(r, k, settings),
        compiler_options=convolution.compiler_options(),
    )
    keys = augment.batch_keys(0, 0, config.batch_size)
    # One state for both: at full size it is 4 GB.
    state = random_inputs.training_state(config, tx, sharding.replicated(mesh))
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    for name, chosen in (("augmented", config), ("plain", plain)):
        steps[name] = train.jit_step(chosen, network, tx, placed)
    times: dict[str, list[float]] = {"augmented": [], "plain": [], "alone": []}
    for repeat in range(-1, _REPEATS.value):  # the first is to compile
        for name in ("augmented", "plain"):
            (state, _), seconds = _timed(steps[name], state, batches[name])
            times[name] += [seconds] * (repeat >= 0)
            print(f"{repeat} {name} {seconds:.2f} s", file=sys.stderr, flush=True)
        _, seconds = _timed(alone, batches["augmented"]["crop"], keys)
        times["alone"] += [seconds] * (repeat >= 0)
    medians = {name: statistics.median(values) for name, values in times.items()}
    report = {
        "benchmark": "augmentation_cost",
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "batch_size": config.batch_size,
        "seconds": medians,
        "augmentation_of_step": medians["alone"] / medians["augmented"],
        "augmented_over_plain": medians["augmented"] / medians["plain"],
        "repeats": _REPEATS.value,
    }
    packages = ("synister_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    print(json.dumps(report | side_by_side.about(*packages)))


def _timed(run: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(run(*arguments))
    return result, time.perf_counter() - start


if __name__ == "__main__":
    command.run(main)
