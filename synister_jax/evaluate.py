# SPDX-License-Identifier: Apache-2.0
r"""Measures how right checkpoints, or the predictions of a table, are.

    python -m synister_jax.evaluate --workdir=RUN --part=validation --steps=1000,2000
    python -m synister_jax.evaluate --workdir=RUN --part=test
    python -m synister_jax.evaluate --predictions=FEATHER --part=test --output=DIR

With --workdir the command predicts every labelled synapse of one part of the split. It
writes these files into RUN/evaluation/<part>/step-<n>:

    metrics.json              the numbers; docs/evaluation.md explains each of them
    predictions.feather       the predictions
    confusion_synapses.png, confusion_neurons.png

RUN/evaluation/<part>/summary.json compares all checkpoints that were evaluated so far
and names the best. accuracy.png shows them if there are several.

With --predictions the command measures the rows of a table that have a label. It writes
metrics.json and the two pictures into DIR.
"""

import pathlib

from absl import flags

from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.evaluation import measured_table, metrics

_ONLY_FOR_A_RUN = ("steps", "shards", "batch_size")  # names of flags


def main() -> None:
    workdir = flags.DEFINE_string(
        "workdir", None, "Evaluate checkpoints of the run in this folder."
    )
    table = flags.DEFINE_string(
        "predictions",
        None,
        "Measure this table of predictions, instead of checkpoints of a run.",
    )
    output = flags.DEFINE_string(
        "output", None, "Write the numbers about --predictions into this folder."
    )
    part = flags.DEFINE_string(
        "part",
        "validation",
        "Evaluate on this part of the split: train, validation or test. With "
        "--predictions, all rows of the table are measured unless the flag is given.",
    )
    split = flags.DEFINE_string(
        "split",
        "skeleton",
        "Take --part from this split of the table, that is, from its column "
        "split_NAME. A run has its own split.",
    )
    steps = flags.DEFINE_list(
        "steps",
        None,
        "Evaluate these checkpoints: step numbers, `all`, or `best` for the best on "
        "validation. By default the latest.",
    )
    shards = flags.DEFINE_string(
        "shards",
        None,
        "Read the crops from this folder, if the shards were moved after training.",
    )
    batch_size = flags.DEFINE_integer(
        "batch_size", 32, "Classify this many crops at once.", lower_bound=1
    )
    n_min = flags.DEFINE_list(
        "n_min",
        list(map(str, metrics.N_MIN)),
        "Measure also the neurons that have at least this many synapses, for each of "
        "these numbers.",
    )
    cutoff = flags.DEFINE_list(
        "cutoff",
        list(map(str, metrics.CUTOFFS)),
        "Measure also the neurons whose winning transmitter has at least this share of "
        "the votes, for each of these shares.",
    )

    def run() -> None:
        selections = measured_table.NeuronSelections.of(n_min.value, cutoff.value)
        if (workdir.value is None) == (table.value is None):
            raise UserError("give either --workdir, or both --predictions and --output")
        useless = ["output", "split"] if table.value is None else _ONLY_FOR_A_RUN
        for name in useless:
            if flags.FLAGS[name].present:
                raise UserError(
                    f"--{name} means nothing with the other flags; leave --{name} out"
                )
        if table.value is not None:
            if output.value is None:
                raise UserError("--predictions needs --output=FOLDER")
            of_part = (split.value, part.value) if flags.FLAGS["part"].present else None
            if of_part is None and flags.FLAGS["split"].present:
                raise UserError(f"--split={split.value} needs --part; give both")
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
