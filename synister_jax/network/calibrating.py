# SPDX-License-Identifier: Apache-2.0
"""Fits the temperature of a checkpoint on one part, and checks it on another."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from synister_jax.base import figures, files
from synister_jax.base.errors import UserError
from synister_jax.evaluation import calibration, intervals
from synister_jax.network import saved_calibration
from synister_jax.tables import predictions, synapses


def fit(workdir: pathlib.Path, step: int, precision_target: float) -> dict[str, Any]:
    """Fits on validation, writes JSON and picture, and returns the content of the JSON.

    `synister_jax.calibrate` says what the keys mean.

    Args:
      precision_target: the share of right calls that `abstain_below` must reach.

    Raises:
      UserError: the checkpoint was not evaluated on validation, or validation has no
        labelled synapse.
    """
    identity, probabilities, truth = _evaluated(
        workdir, step, saved_calibration.FITTED_ON
    )
    temperature = calibration.fit(probabilities, truth)
    curve = calibration.Curve.of(calibration.apply(probabilities, temperature), truth)
    abstain_below = curve.lowest(precision_target)
    fitted = {
        "temperature": temperature,
        "precision_target": precision_target,
        "abstain_below": abstain_below,
    }
    measured = identity | _measure(probabilities, truth, identity["classes"], fitted)
    path = saved_calibration.path_of(workdir, step)
    picture = path.with_name(f"reliability-step-{step}.png")
    _write(path, picture, measured)
    if temperature in calibration.BOUNDS:
        print(f"step {step}: the temperature is at its bound, {temperature:g}")
    if abstain_below is None:
        best = int(curve.precision.argmax())
        print(
            f"step {step}: at no confidence is a share of {precision_target:g} right; "
            f"the highest share is {curve.precision[best]:.3f}, of the "
            f"{curve.kept[best]:,} synapses at or above {curve.threshold[best]:.3f}"
        )
    return measured


def check(workdir: pathlib.Path, step: int, part: str) -> dict[str, Any]:
    """Measures on another part what was fitted on validation. Fits nothing.

    Returns the content of the JSON file, which `synister_jax.calibrate` explains.

    Raises:
      UserError: nothing was fitted, or it was fitted on other crops; or the checkpoint
        was not evaluated on this part.
    """
    path, fitted = (
        saved_calibration.path_of(workdir, step),
        saved_calibration.read(workdir, step),
    )
    identity, probabilities, truth = _evaluated(workdir, step, part)
    for name in ("classes", "split", "crops", "parameters_sha256"):
        if identity[name] != fitted[name]:
            raise UserError(
                f"{path} was fitted with {name} {fitted[name]}, but {part} was "
                f"evaluated with {identity[name]}; evaluate both parts again, then "
                "calibrate, then check"
            )
    names = ("temperature", "precision_target", "abstain_below")
    kept = {name: fitted[name] for name in names}
    measured = identity | _measure(probabilities, truth, identity["classes"], kept)
    path = path.with_name(f"check-{part}-step-{step}.json")
    _write(path, path.with_suffix(".png"), measured)
    return measured


def _evaluated(
    workdir: pathlib.Path, step: int, part: str
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Returns (identity, probabilities [n, k], labels [n]) of the labelled rows."""
    folder = workdir / "evaluation" / part / f"step-{step}"
    again = (
        f"run python -m synister_jax.evaluate --workdir={workdir} --part={part} "
        f"--steps={step} first"
    )
    # metrics.json is written last: a folder that has it is complete.
    if not (folder / "metrics.json").exists():
        raise UserError(f"{folder}/metrics.json is not there; {again}")
    metrics = files.read_json(folder / "metrics.json")
    table = predictions.load(folder / "predictions.feather")
    about = predictions.about(table)
    _require_one_evaluation(folder, metrics, about, step, part, again)
    classes = predictions.classes(table)
    probabilities, truth = calibration.known(
        predictions.probabilities(table), synapses.labels(table, classes)
    )
    if not len(truth):
        raise UserError(
            f"{folder}/predictions.feather has no labelled synapse with a prediction"
        )
    identity = {name: metrics[name] for name in ("step", "split", "crops", "part")}
    identity["classes"] = list(classes)
    identity["parameters_sha256"] = about.get("parameters_sha256")
    return identity, probabilities, truth


def _require_one_evaluation(
    folder: pathlib.Path,
    metrics: dict[str, Any],
    about: dict[str, Any],
    step: int,
    part: str,
    again: str,
) -> None:
    """Raises `UserError` if the files come from different evaluations."""
    expected = {"step": step, "part": part, "split": metrics.get("split")}
    for name, value in expected.items():
        for file, said in (("metrics.json", metrics), ("predictions.feather", about)):
            if said.get(name) != value:
                raise UserError(
                    f"{folder}/{file} belongs to {name} {said.get(name)}, not to "
                    f"{value}; {again}"
                )


def _measure(
    probabilities: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    fitted: dict[str, Any],
) -> dict[str, Any]:
    """Returns the measured keys of the JSON file; `synister_jax.calibrate` has them."""
    after = calibration.apply(probabilities, fitted["temperature"])
    curve = calibration.Curve.of(after, truth)
    threshold = fitted["abstain_below"]
    coverage = precision = of_classes = None
    if threshold is not None:
        coverage, precision = curve.at(threshold)
        found = calibration.by_class(after, truth, threshold)
        of_classes = {
            name: {"kept": kept, "precision": right}
            for name, (kept, right) in zip(classes, found, strict=True)
        }
    return {
        "rows": len(truth),
        **fitted,
        "coverage": coverage,
        "precision": precision,
        "by_class": of_classes,
        **{
            when: {"loss": calibration.loss(values, truth)}
            | calibration.reliability(values, truth)
            for when, values in (("before", probabilities), ("after", after))
        },
        "curve": curve.points(),
    }


def _write(path: pathlib.Path, picture: pathlib.Path, measured: dict[str, Any]) -> None:
    files.make_folder(path.parent)
    rows, part, step = measured["rows"], measured["part"], measured["step"]
    title = f"{part}, step {step}: {rows:,} synapses"
    content = figures.png(figures.calibration(measured, title, intervals.wilson))
    files.write_bytes(picture, content)
    files.write_json(path, measured)
    before, after = measured["before"], measured["after"]
    line = (
        f"step {step}, {rows:,} synapses of {part}: temperature "
        f"{measured['temperature']:.3f}; ECE {before['ece']:.3f} → {after['ece']:.3f}, "
        f"loss {before['loss']:.3f} → {after['loss']:.3f}"
    )
    if measured["abstain_below"] is not None:
        precision = measured["precision"]
        shown = "none" if precision is None else f"{precision:.3f}"
        line += (
            f"; {measured['coverage']:.3f} of them reach the confidence "
            f"{measured['abstain_below']:.3f}, and {shown} of these are right (asked: "
            f"{measured['precision_target']:g})"
        )
    print(f"{line}; {path}", flush=True)
