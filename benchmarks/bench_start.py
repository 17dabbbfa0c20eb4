# SPDX-License-Identifier: Apache-2.0
"""Measures seconds from the start of `synister_jax.predict` to its first predictions.

    python -m benchmarks.bench_start --folder=FOLDER --config=configs/demo.py \
        [--rounds=5]

Each start is a new process (start_stages.py) that predicts one batch of random synapses
in a small volume, and notes when it gets where. predict sets no compile cache; here the
environment does (JAX_COMPILATION_CACHE_DIR), and a start before has filled it. `cache`:
as JAX does it by default, of programs that took a second or more to compile;
`cache_of_all`: of every program; `no_cache`: switched off. On a CPU a program that
calls the library of convolutions cannot be stored (network/convolution.py), so the
network is compiled at each start, whatever the cache. The three alternate; there is no
other side. All files lie in the system's cache, Python's as bytecode.
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
    # The round before the first fills the cache.
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
    """Returns the seconds to each moment of a start."""
    started = time.time()
    program = [sys.executable, "-m", "benchmarks.start_stages", str(started)]
    said = subprocess.check_output([*program, *arguments], env=os.environ | environment)
    return json.loads(said.splitlines()[-1]) | {"exit": time.time() - started}


if __name__ == "__main__":
    command.run(main)
