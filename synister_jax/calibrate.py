# SPDX-License-Identifier: Apache-2.0
r"""Fits a checkpoint's temperature on validation; checks it on test.

    python -m synister_jax.evaluate  --workdir=RUN --part=validation --steps=best
    python -m synister_jax.calibrate --workdir=RUN --steps=best [--precision=0.95]
    python -m synister_jax.predict   --workdir=RUN --step=best --calibrated …
    python -m synister_jax.calibrate --workdir=RUN --steps=best --check=test

Writes RUN/calibration/step-<n>.json and reliability-step-<n>.png from the predictions
of evaluate; test is never opened for that. --check=test measures what was fitted on
those of test, and writes check-test-step-<n>.json and .png. Either JSON file has

    step, split, crops (sha256), part, classes     of the predictions measured
    parameters_sha256       of the checkpoint; null where evaluate did not keep it
    rows                    labelled, predicted synapses of the part
    temperature             fitted on validation
    precision_target, abstain_below
                            the lowest confidence (highest probability after the
                            temperature) at or above which, on validation, that share of
                            the calls is right; null where there is none
    coverage, precision     of the part at or above it; null without it
    by_class                {class: {kept, precision}} at or above it; null without it
    before, after           {loss, ece, bins}, without and with the temperature
    curve                   at most 200 {threshold, coverage, precision}, falling
                            threshold, after the temperature
"""

import math
import pathlib

from absl import flags

from synister_jax.base import command
from synister_jax.base.errors import UserError


def main() -> None:
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    steps = flags.DEFINE_list(
        "steps",
        None,
        "Checkpoints: numbers, `all`, or `best` (of validation); default the latest.",
    )
    precision = flags.DEFINE_float(
        "precision", 0.95, "Share of right calls to keep.", 0.0, 1.0
    )
    part = flags.DEFINE_enum(
        "check", None, ["test"], "Measure on this part what was fitted; fit nothing."
    )

    def run() -> None:
        if part.value is not None and flags.FLAGS["precision"].present:
            raise UserError("--precision means nothing with --check; leave it out")
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
