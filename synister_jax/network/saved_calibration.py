# SPDX-License-Identifier: Apache-2.0
"""Reads the temperature of a checkpoint from the file that `calibrate` writes."""

import pathlib
from collections.abc import Sequence
from typing import Any

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.evaluation import calibration
from synister_jax.network import checkpoint, inference

FITTED_ON = "validation"
_IDENTITY = {"step", "split", "crops", "part", "classes", "parameters_sha256"}
_NAMES = _IDENTITY | {"temperature", "precision_target", "abstain_below"}


def load(members: Sequence[tuple[str, int]], views: int) -> dict[str, Any]:
    """Returns the content of the calibration file of the one checkpoint in `members`.

    Args:
      members: (workdir, step) of the checkpoints to predict with.
      views: number of views per crop to predict with.

    Raises:
      UserError: there are several checkpoints or views; the checkpoint has no
        calibration file; or the file belongs to other crops, classes or another step.
    """
    inference.require_one(len(members), views)
    [(workdir, step)] = members
    folder = pathlib.Path(workdir)
    config, fitted = checkpoint.load_config(folder), read(folder, step)
    expected = {"step": step, "part": FITTED_ON, "classes": list(config.classes)}
    if config.get("crops_sha256"):  # unknown for imported weights
        expected["crops"] = config.crops_sha256
    for name, value in expected.items():
        if fitted[name] != value:
            raise UserError(
                f"{path_of(folder, step)} was fitted with {name} {fitted[name]}, but "
                f"the checkpoint has {value}; run evaluate --part=validation and "
                "calibrate again"
            )
    return fitted


def require_parameters(fitted: dict[str, Any], parameters_sha256: str) -> None:
    """Raises `UserError` if the calibration is known to belong to other parameters."""
    if fitted["parameters_sha256"] not in (None, parameters_sha256):
        raise UserError(
            f"the calibration of step {fitted['step']} was fitted to parameters that "
            "the checkpoint no longer has; run evaluate --part=validation and "
            "calibrate again"
        )


def path_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """Returns the path of the calibration file, even if the file does not exist."""
    return workdir / "calibration" / f"step-{step}.json"


def read(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns the content of the calibration file of a step.

    Raises:
      UserError: the file does not exist, lacks an entry, or has an impossible
        temperature.
    """
    path = path_of(workdir, step)
    if not path.exists():
        raise UserError(f"{path} does not exist; {_how_to_fit(workdir, step)}")
    fitted = files.read_json(path)
    if not isinstance(fitted, dict) or not _NAMES <= fitted.keys():
        raise UserError(
            f"{path} is not a file that calibrate wrote; {_how_to_fit(workdir, step)}"
        )
    temperature, (low, high) = fitted["temperature"], calibration.BOUNDS
    if not (isinstance(temperature, float | int) and low <= temperature <= high):
        raise UserError(
            f"{path}: a temperature of {temperature} is not possible; "
            f"{_how_to_fit(workdir, step)}"
        )
    return fitted


def _how_to_fit(workdir: str | pathlib.Path, step: int) -> str:
    return (
        f"run python -m synister_jax.calibrate --workdir={workdir} --steps={step} first"
    )
