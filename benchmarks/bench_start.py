# SPDX-License-Identifier: Apache-2.0
r"""Measures the seconds from the start of `synister_jax.predict` to its predictions.

    python -m benchmarks.bench_start --folder=FOLDER --config=configs/demo.py \
        --rounds=5

Each start is a new process (start_stages.py). It predicts one batch of random synapses
in a small volume, and notes when it reaches each stage. JAX can keep compiled programs
in a cache. `predict` sets no such cache. Here the environment variable
JAX_COMPILATION_CACHE_DIR sets it, and an earlier start has filled it. Three settings
are measured in turns:

- `cache` keeps the programs that took a second or more to compile. This is the default
  of JAX.
- `cache_of_all` keeps every program.
- `no_cache` keeps no program.

On a CPU, JAX cannot store a program that calls the library of convolutions
(network/convolution.py). So the network is compiled at each start, with every cache.
No other program is compared. All files are in the cache of the operating system, and
Python's files are compiled to bytecode.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import command_line, made_inputs, our_sides, side_by_side
from synister_jax.base import command, files
from synister_jax.em import volumes

_BATCH_SIZE = 32


def main() -> None:
    config, folder = command_line.CONFIG.value, command_line.folder()
    path = made_inputs.tiled_volume(
        folder, None, made_inputs.SMALL_ZYX, config.voxel_size_nm_zyx
    )
    volume = volumes.open(str(path), config.voxel_size_nm_zyx)
    table = folder / "synapses.feather"
    files.write_feather(table, made_inputs.synapses(volume, config, _BATCH_SIZE))
    workdir = made_inputs.run(
        folder, config, "run", lambda: our_sides.Network(config).variables()
    )
    given = {"workdir": workdir, "synapses": table}
    given |= {"volume": path, "output": folder / "output", "batch_size": _BATCH_SIZE}
    arguments = [f"--{name}={value}" for name, value in given.items()]

    cache = (folder / "compiled").resolve()
    shutil.rmtree(cache, ignore_errors=True)
    at = "JAX_COMPILATION_CACHE_DIR"
    shortest = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    environments = {
        "cache": {at: f"{cache}/slow"},
        "cache_of_all": {at: f"{cache}/all", shortest: "0"},
        "no_cache": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    }
    noted: dict[str, list[dict[str, float]]] = {name: [] for name in environments}
    # The warm-up round fills the cache.
    for index, name in side_by_side.in_turns(
        list(environments), command_line.ROUNDS.value
    ):
        shutil.rmtree(folder / "output", ignore_errors=True)
        found = _start(arguments, environments[name])
        print(f"{index} {name} {found}", file=sys.stderr, flush=True)
        noted[name] += [found] * (index >= 0)
    medians = {
        name: {what: statistics.median(each[what] for each in starts) for what in found}
        for name, starts in noted.items()
    }
    report: dict[str, Any] = {
        f"seconds_to_{what}": {name: found[what] for name, found in medians.items()}
        for what in ("first_prediction", "exit")
    }
    report |= {"seconds_from_start_to": medians, "rounds": noted}
    report["programs_in_cache"] = {
        name: len(list(cache.glob(f"{name}/*-cache"))) for name in ("slow", "all")
    }
    report["batch_size"] = _BATCH_SIZE
    command_line.print_report("start", "s", report, config)


def _start(arguments: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Starts a prediction, and returns the seconds from the start to each stage."""
    started = time.time()
    program = [sys.executable, "-m", "benchmarks.start_stages", str(started)]
    said = subprocess.check_output([*program, *arguments], env=os.environ | environment)
    return json.loads(said.splitlines()[-1]) | {"exit": time.time() - started}


if __name__ == "__main__":
    command.run(main)
