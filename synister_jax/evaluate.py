# SPDX-License-Identifier: Apache-2.0
r"""Evaluates checkpoints on a whole part of the split, or a table of predictions.

    python -m synister_jax.evaluate --workdir=RUN --part=validation --steps=1000,2000
    python -m synister_jax.evaluate --workdir=RUN --part=test
    python -m synister_jax.evaluate --predictions=FEATHER --part=test --output=DIR

Writes RUN/evaluation/<part>/step-<n>/{metrics.json, predictions.feather,
confusion_synapses.png, confusion_neurons.png}, RUN/evaluation/<part>/summary.json,
which names the best of all checkpoints evaluated so far, and accuracy.png of several;
of a table of predictions DIR/{metrics.json, confusion_*.png}. docs/evaluation.md says
what is in metrics.json.
"""

import pathlib

from absl import flags

from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.evaluation import measured_table, metrics

_OF_A_RUN = ("steps", "shards", "batch_size")  # flags


def main() -> None:
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.")
    table = flags.DEFINE_string("predictions", None, "Or a table of predictions.")
    output = flags.DEFINE_string("output", None, "Folder for what is said of it.")
    part = flags.DEFINE_string("part", "validation", "validation, test or train.")
    split = flags.DEFINE_string("split", "skeleton", "Split of --predictions' --part.")
    steps = flags.DEFINE_list(
        "steps", None, "Checkpoints: numbers, `all`, or `best` (of validation)."
    )
    shards = flags.DEFINE_string("shards", None, "Shards, if moved since training.")
    batch_size = flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
    n_min = flags.DEFINE_list(
        "n_min", list(map(str, metrics.N_MIN)), "Neurons of so many synapses."
    )
    cutoff = flags.DEFINE_list(
        "cutoff",
        list(map(str, metrics.CUTOFFS)),
        "Neurons whose winner has such a share of votes.",
    )

    def run() -> None:
        selections = measured_table.NeuronSelections.of(n_min.value, cutoff.value)
        if (workdir.value is None) == (table.value is None):
            raise UserError("give either --workdir or --predictions with --output")
        useless = ["output", "split"] if table.value is None else _OF_A_RUN
        for name in useless:
            if flags.FLAGS[name].present:
                raise UserError(f"--{name} means nothing here; leave it out")
        if table.value is not None:
            if output.value is None:
                raise UserError("--predictions needs --output, a folder")
            of_part = (split.value, part.value) if flags.FLAGS["part"].present else None
            if of_part is None and flags.FLAGS["split"].present:
                raise UserError(f"--split={split.value} without --part: give both")
            measured_table.evaluate_table(
                pathlib.Path(table.value),
                pathlib.Path(output.value),
                of_part,
                selections,
            )
            return
        assert workdir.value is not None  # one of the two is given
        # JAX takes seconds to import: a table is measured without it.
        from synister_jax.network import checkpoint
        from synister_jax.training import checkpoint_evaluation

        run_folder = pathlib.Path(workdir.value)
        checkpoint_evaluation.evaluate(
            run_folder,
            part.value,
            checkpoint.parse_steps(run_folder, steps.value),
            shards.value,
            batch_size.value,
            selections,
        )

    command.run(run)


if __name__ == "__main__":
    main()
