# SPDX-License-Identifier: Apache-2.0
r"""Writes one HTML page about a run, about predictions, or about both.

    python -m synister_jax.report --workdir=RUN --predictions=DIR/predictions.feather \
        --output=report.html

The page needs no server and no other file, and it can be printed. Without JavaScript it
still shows its pictures and the first rows of its tables.
"""

import pathlib

from absl import flags

from synister_jax.base import command, files
from synister_jax.evaluation import confusions, metrics, voting_rules


def main() -> None:
    workdir = flags.DEFINE_string(
        "workdir", None, "Report on the run in this folder: training and evaluation."
    )
    table = flags.DEFINE_string(
        "predictions",
        None,
        "Report on these predictions: a Feather file, or a folder of Parquet files.",
    )
    rule = flags.DEFINE_enum(
        "rule",
        metrics.RULE,
        list(voting_rules.RULES),
        "Call the neurons of --predictions by this rule.",
    )
    confusion = flags.DEFINE_string(
        "confusion",
        None,
        "Give this confusion matrix to the rules that need one: metrics.json of the "
        "test part, its folder RUN/evaluation/test, or a CSV whose rows are the true "
        "classes.",
    )
    shards = flags.DEFINE_string(
        "shards",
        None,
        "Read the crops of the run from this folder, if the shards were moved after "
        "training.",
    )
    output = flags.DEFINE_string(
        "output", None, "Write the page into this HTML file.", required=True
    )

    def run() -> None:
        # JAX takes seconds to import: --help and wrong flags answer without it.
        from synister_jax.pages import report

        if table.value is not None:
            files.require_other(output.value, table.value)
        matrix = None if confusion.value is None else confusions.load(confusion.value)
        with files.scratch(output.value) as folder:
            text = report.render(
                None if workdir.value is None else pathlib.Path(workdir.value),
                None if table.value is None else pathlib.Path(table.value),
                rule.value,
                matrix,
                folder,
                None if shards.value is None else pathlib.Path(shards.value),
            )
        files.write_text(output.value, text)
        print(f"report: {pathlib.Path(output.value).resolve()}")

    command.run(run)


if __name__ == "__main__":
    main()
