# SPDX-License-Identifier: Apache-2.0
r"""One self-contained HTML page about a run, about predictions, or about both.

    python -m synister_jax.report --workdir=RUN --predictions=DIR/predictions.feather \
        --output=report.html

The page asks nothing of any server, prints, and shows its pictures and the first rows
of its tables without JavaScript too.
"""

import pathlib

from absl import flags

from synister_jax.base import command, files
from synister_jax.evaluation import confusions, metrics, voting_rules


def main() -> None:
    workdir = flags.DEFINE_string("workdir", None, "Folder of a run.")
    table = flags.DEFINE_string(
        "predictions", None, "Predictions: Feather, or a folder of Parquet files."
    )
    rule = flags.DEFINE_enum(
        "rule",
        metrics.RULE,
        list(voting_rules.RULES),
        "How --predictions' neurons are called.",
    )
    confusion = flags.DEFINE_string(
        "confusion", None, "metrics.json or CSV, for the rules that need it."
    )
    shards = flags.DEFINE_string("shards", None, "Shards, if moved since training.")
    output = flags.DEFINE_string("output", None, "HTML file to write.", required=True)

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
