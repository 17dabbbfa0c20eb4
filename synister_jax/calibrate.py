# SPDX-License-Identifier: Apache-2.0
r"""Fits the temperature of a checkpoint on validation, and checks it on test.

    python -m synister_jax.evaluate  --workdir=RUN --part=validation --steps=best
    python -m synister_jax.calibrate --workdir=RUN --steps=best [--precision=0.95]
    python -m synister_jax.predict   --workdir=RUN --step=best --calibrated …
    python -m synister_jax.calibrate --workdir=RUN --steps=best --check=test

The temperature is a number that divides the logits, so that a probability of 0.9 is
right nine times in ten. The command fits it to the predictions that `evaluate` wrote
for the validation part, and writes RUN/calibration/step-<n>.json and
reliability-step-<n>.png. It does not read the test part. With --check=test it fits
nothing: it measures the fitted numbers on the test part and writes
check-test-step-<n>.json and .png. Both JSON files have these keys:

    step, split, crops, part, classes
                       whose predictions were measured; `crops` is the sha256 of the
                       crops
    parameters_sha256  the parameters of the checkpoint; null if `evaluate` did not keep
                       them
    rows               the number of synapses with a label and a prediction
    temperature        the number that was fitted on validation
    precision_target   the value of --precision
    abstain_below      the lowest confidence at which so large a share of the calls is
                       right on validation; null if there is none. The confidence is the
                       highest probability after the temperature.
    coverage, precision
                       the share of synapses whose confidence reaches abstain_below, and
                       the share of these that is right; null without abstain_below
    by_class           the same for each class: {class: {kept, precision}}
    before, after      {loss, ece, bins} without and with the temperature
    curve              at most 200 points {threshold, coverage, precision}, from the
                       highest threshold to the lowest, after the temperature
"""

import math
import pathlib

from absl import flags

from synister_jax.base import command
from synister_jax.base.errors import UserError


def main() -> None:
    workdir = flags.DEFINE_string(
        "workdir", None, "Calibrate the run in this folder.", required=True
    )
    steps = flags.DEFINE_list(
        "steps",
        None,
        "Calibrate these checkpoints: step numbers, `all`, or `best` for the best on "
        "validation. By default the latest.",
    )
    precision = flags.DEFINE_float(
        "precision",
        0.95,
        "Find the lowest confidence at which this share of the calls is right.",
        0.0,
        1.0,
    )
    part = flags.DEFINE_enum(
        "check",
        None,
        ["test"],
        "Fit nothing. On this part, test the temperature and confidence of an earlier "
        "fit.",
    )

    def run() -> None:
        if part.value is not None and flags.FLAGS["precision"].present:
            raise UserError(
                "--precision means nothing with --check; leave --precision out"
            )
        if math.isnan(precision.value):
            raise UserError("--precision=nan: give a share, from 0 to 1")
        # JAX takes seconds to import: --help and wrong flags answer without it.
        from synister_jax.network import calibrating, checkpoint

        folder = pathlib.Path(workdir.value)
        chosen = checkpoint.parse_steps(folder, steps.value)
        for given in chosen or (None,):
            step = checkpoint.choose_step(folder, given)
            if part.value is None:
                calibrating.fit(folder, step, precision.value)
            else:
                calibrating.check(folder, step, part.value)

    command.run(run)


if __name__ == "__main__":
    main()
