# SPDX-License-Identifier: Apache-2.0
"""Flags that most benchmarks take, and the line of JSON that each of them prints."""

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

flags.disclaim_key_flags()  # `--help` shows those defined here as the program's


def define_count(name: str, default: int, text: str) -> flags.FlagHolder[int]:
    """Defines a flag that takes a number from 1."""
    return flags.DEFINE_integer(name, default, text, lower_bound=1)


def define_texture() -> flags.FlagHolder[str]:
    """Defines the flag of the benchmarks that read voxels."""
    return flags.DEFINE_string(
        "texture", None, "Volume of real EM to read from; without it, smooth noise."
    )


FOLDER = flags.DEFINE_string(
    "folder", None, "Folder where the benchmark keeps what it makes.", required=True
)
CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", "Configuration of the network and its training."
)
ROUNDS = define_count("rounds", 5, "Number of timed rounds of each side.")
SIDE = flags.DEFINE_string(
    "side", None, "Be this side; for programs that start themselves anew."
)


for _name in ("folder", "config", "rounds"):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[_name])


def folder() -> pathlib.Path:
    """Makes the folder of `--folder` and returns it."""
    return files.make_folder(FOLDER.value)


def keep_compiled() -> None:
    """Keeps compiled programs in the folder, for the next run."""
    jax.config.update("jax_compilation_cache_dir", str(folder() / "compiled"))


def require(package: str) -> None:
    """Raises a UserError where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; `make bench-env` installs it")


def run_with_torch(compare: Callable[[], None], be: Callable[[str], None]) -> None:
    """Runs a program that compares children, some of which use PyTorch.

    Args:
      compare: Compares; a run with PyTorch's weights is made before.
      be: Serves in a child as the side of this name.
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
    """Prints one line of JSON: what was found, of what network, on what machine."""
    report = {"benchmark": benchmark, "unit": unit, "rounds_of_each": ROUNDS.value}
    if config is not None:
        report |= {"batch_size": config.batch_size}
        report |= {"crop_shape_zyx": list(config.crop_shape_zyx)}
        report |= {"parameters": peaks.parameters(config)}
        report |= {"compute_dtype": config.compute_dtype}
    print(json.dumps(report | found | side_by_side.about()))
