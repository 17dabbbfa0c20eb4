# SPDX-License-Identifier: Apache-2.0
"""Defines the flags of most benchmarks, and prints their reports as a line of JSON."""

import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from benchmarks import peaks, side_by_side
from synister_jax.base import files
from synister_jax.base.errors import UserError

flags.disclaim_key_flags()  # --help lists these flags with those of the program


def define_count(name: str, default: int, text: str) -> flags.FlagHolder[int]:
    """Defines a flag whose value is an integer of at least 1."""
    return flags.DEFINE_integer(name, default, text, lower_bound=1)


def define_texture() -> flags.FlagHolder[str]:
    """Defines the flag of the benchmarks that read voxels."""
    return flags.DEFINE_string(
        "texture",
        None,
        "Read voxels of this volume of real EM. The default is smooth noise.",
    )


FOLDER = flags.DEFINE_string(
    "folder",
    None,
    "Keep the volumes, tables and runs of the benchmark in this folder.",
    required=True,
)
CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", "Use this config for the network and its training."
)
ROUNDS = define_count("rounds", 5, "Measure each side in this many rounds.")
SIDE = flags.DEFINE_string(
    "side",
    None,
    "Run as the child process of this side. Programs set this flag for their children.",
)


for _name in ("folder", "config", "rounds"):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[_name])


def folder() -> pathlib.Path:
    """Makes the folder that `--folder` names, and returns its path."""
    return files.make_folder(FOLDER.value)


def keep_compiled() -> None:
    """Makes JAX keep compiled programs in the folder for the next run."""
    jax.config.update("jax_compilation_cache_dir", str(folder() / "compiled"))


def require(package: str) -> None:
    """Raises a UserError if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; `make bench-env` installs it")


def run_with_torch(compare: Callable[[], None], be: Callable[[str], None]) -> None:
    """Runs a program that compares child processes, some of which use PyTorch.

    Args:
      compare: compares the sides. Before, a run with the weights of PyTorch is made.
      be: answers requests in a child process as the side with the given name.

    Raises:
      UserError: PyTorch is not installed.
    """
    require("torch")
    if SIDE.value is None:
        subprocess.run(side_by_side.own_command("--side=make"), check=True)
        compare()
    elif SIDE.value == "make":
        from benchmarks import torch_sides

        torch_sides.make_run(folder(), CONFIG.value)
    else:
        be(SIDE.value)


def print_report(
    benchmark: str,
    unit: str,
    found: dict[str, Any],
    config: ml_collections.ConfigDict | None = None,
) -> None:
    """Prints one line of JSON with the results, the network and the machine."""
    report = {"benchmark": benchmark, "unit": unit, "rounds_of_each": ROUNDS.value}
    if config is not None:
        report |= {"batch_size": config.batch_size}
        report |= {"crop_shape_zyx": list(config.crop_shape_zyx)}
        report |= {"parameters": peaks.parameters(config)}
        report |= {"compute_dtype": config.compute_dtype}
    print(json.dumps(report | found | side_by_side.about()))
