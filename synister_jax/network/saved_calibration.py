# SPDX-License-Identifier: Apache-2.0
"""The temperature fitted to a checkpoint, in the file that calibrate.py writes."""

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
    """What was fitted, for predicting with these (workdir, step).

    Raises:
      UserError: there is none, it is not of this run's crops or classes, or there are
        several networks or views.
    """
    inference.require_one(len(members), views)
    [(workdir, step)] = members
    folder = pathlib.Path(workdir)
    config, fitted = checkpoint.load_config(folder), read(folder, step)
    expected = {"step": step, "part": FITTED_ON, "classes": list(config.classes)}
    if config.get("crops_sha256"):  # of imported weights nobody knows the crops
        expected["crops"] = config.crops_sha256
    for name, value in expected.items():
        if fitted[name] != value:
            raise UserError(
                f"{path_of(folder, step)} is of {name} {fitted[name]}, the checkpoint "
                f"of {value}; run evaluate --part=validation and calibrate again"
            )
    return fitted


def require_parameters(fitted: dict[str, Any], parameters_sha256: str) -> None:
    """Raises `UserError` where the fit is known to be of other parameters."""
    if fitted["parameters_sha256"] not in (None, parameters_sha256):
        raise UserError(
            f"the calibration of step {fitted['step']} was fitted to parameters that "
            "the checkpoint no longer has; run evaluate --part=validation and "
            "calibrate again"
        )


def path_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """Of the file, whether it is there or not."""
    return workdir / "calibration" / f"step-{step}.json"


def read(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """What calibrate.py has written; `UserError` where there is nothing of it."""
    path = path_of(workdir, step)
    if not path.exists():
        raise UserError(f"{path} is not there; {_how_to_fit(workdir, step)}")
    fitted = files.read_json(path)
    if not isinstance(fitted, dict) or not _NAMES <= fitted.keys():
        raise UserError(f"{path} is not what was written; {_how_to_fit(workdir, step)}")
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
