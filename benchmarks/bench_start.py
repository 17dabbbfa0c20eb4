# SPDX-License-Identifier: Apache-2.0
"""Seconds from the start of `synister_jax.predict` to its first predictions.

    python benchmarks/bench_start.py --folder=FOLDER [--config=configs/demo.py] \
        [--workdir=RUN] [--rounds=5]

Each start is a new process of `python -m synister_jax.predict` on one batch of random
synapses in a small volume; it is timed until the part file with their probabilities is
there, and until its end, when they are merged. predict sets no compile cache; here the
environment does (JAX_COMPILATION_CACHE_DIR), and a start before has filled it. `cache`:
as JAX does it by default, of programs that took a second or more to compile;
`cache_of_all`: of every program; `no_cache`: switched off. On a CPU a program that
calls the library of convolutions cannot be stored (synister_jax/convolution.py), so the
network is compiled at each start, whatever the cache; `programs_in_cache` says how many
there are. The three alternate; medians. All files lie in the system's cache, Python's
as bytecode.

Of one more start each the stages, which start_stages.py notes: Python
and imports, the run's weights restored, the work planned, the first batch started,
written; and what of that was JAX tracing, lowering and compiling (or taking what was
compiled from the cache). There is no other side. Prints one line of JSON.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import peaks
import pyarrow as pa
import random_inputs
import side_by_side
from absl import flags
from ml_collections import config_flags

from synister_jax.base import command, files
from synister_jax.em import volumes
from synister_jax.network import checkpoint

_FOLDER = flags.DEFINE_string(
    "folder", None, "Where run and volume are, or are made.", required=True
)
_CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run; else one of --config with random weights."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed starts of each.", lower_bound=1)
_SHAPE = flags.DEFINE_list(
    "volume_shape_zyx", ["64", "1024", "1024"], "Voxels of the volume."
)

_STAGES = pathlib.Path(__file__).with_name("start_stages.py")


def main() -> None:
    folder = files.make_folder(_FOLDER.value)
    arguments, about = _make(folder)
    cache = folder / "compiled"
    shutil.rmtree(cache, ignore_errors=True)
    environments = {
        "cache": {"JAX_COMPILATION_CACHE_DIR": f"{cache.resolve()}/slow"},
        "cache_of_all": {
            "JAX_COMPILATION_CACHE_DIR": f"{cache.resolve()}/all",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        "no_cache": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    }
    first: dict[str, list[float]] = {name: [] for name in environments}
    whole: dict[str, list[float]] = {name: [] for name in environments}
    # The round before the first fills the cache.
    for index, name in side_by_side.in_turns(list(environments), _ROUNDS.value):
        seconds = _start(folder / "output", arguments, environments[name])
        print(f"{index} {name} {seconds}", file=sys.stderr, flush=True)
        if index >= 0:
            first[name].append(seconds[0])
            whole[name].append(seconds[1])
    stages = {
        name: _stages(folder / "output", arguments, environment)
        for name, environment in environments.items()
    }
    report = {
        "benchmark": "start",
        "unit": "s",
        "seconds_to_first_prediction": _medians(first),
        "seconds_to_exit": _medians(whole),
        "rounds_seconds_to_first_prediction": first,
        "rounds_seconds_to_exit": whole,
        "seconds_from_start_to": stages,
        "programs_in_cache": {
            name: len(list(cache.glob(f"{name}/*-cache"))) for name in ("slow", "all")
        },
        "batch_size": _BATCH_SIZE.value,
        "rounds": _ROUNDS.value,
    }
    packages = ("synister_jax", "jax", "jaxlib", "orbax-checkpoint", "tensorstore")
    print(json.dumps(report | about | side_by_side.about(*packages)))


def _make(folder: pathlib.Path) -> tuple[list[str], dict[str, Any]]:
    """Flags for predict, of inputs that are made where they are not there."""
    workdir = pathlib.Path(
        _WORKDIR.value or random_inputs.workdir(folder, _CONFIG.value)
    )
    config = checkpoint.load_config(workdir)
    shape = list(map(int, _SHAPE.value))
    path = random_inputs.volume_path(folder, shape, config)
    volume = volumes.open(str(path), config.voxel_size_nm_zyx)
    table = folder / "synapses.feather"
    synapses = random_inputs.synapses(volume, config, _BATCH_SIZE.value)
    files.write_feather(table, pa.Table.from_batches([synapses]))
    flags_of_predict = {
        "workdir": workdir,
        "synapses": table,
        "volume": path,
        "output": folder / "output",
        "batch_size": _BATCH_SIZE.value,
    }
    about = {
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "parameters": peaks.parameters(config),
    }
    return [f"--{name}={value}" for name, value in flags_of_predict.items()], about


def _start(
    output: pathlib.Path, arguments: list[str], environment: dict[str, str]
) -> tuple[float, float]:
    """Seconds to the first part file, and to the end of the process."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "synister_jax.predict", *arguments],
        stdout=sys.stderr,
        env=os.environ | environment,
    )
    part = output / "parts" / "part-000000-of-000001.feather"
    while not part.exists() and process.poll() is None:
        time.sleep(0.005)
    first = time.perf_counter() - started
    if process.wait():
        raise RuntimeError(f"predict ended with {process.returncode}")
    return first, time.perf_counter() - started


def _stages(
    output: pathlib.Path, arguments: list[str], environment: dict[str, str]
) -> dict[str, float]:
    """What start_stages.py prints."""
    shutil.rmtree(output, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, str(_STAGES), str(time.time()), *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    command.run(main)
