# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about a run, about predictions, or about both.

    python -m synister_jax.report --workdir=RUN --predictions=DIR/predictions.feather \
        --output=report.html

The page asks nothing of any server, prints, and shows its pictures and the first rows
of its tables without JavaScript too.
"""

import pathlib
from typing import Any

from absl import flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.evaluation import confusions, metrics, voting_rules
from synister_jax.evaluation.confusions import Confusion
from synister_jax.pages import predictions_section, rendering, run_section
from synister_jax.tables import predictions


def render(
    workdir: pathlib.Path | None,
    predictions_path: pathlib.Path | None,
    rule: str = metrics.RULE,
    confusion: Confusion | None = None,
    folder: pathlib.Path | None = None,
    shards: pathlib.Path | None = None,
) -> str:
    """The page as text.

    Args:
      workdir: a run; what was trained on, curves, and what `evaluate` left there.
      predictions_path: predictions of any size whose neurons are listed.
      rule: by which they are called (`voting_rules.RULES`).
      confusion: of the network, for the rules that need it.
      folder: on a disk with room for what does not fit into memory.
      shards: of the run, where they have moved since training.

    Raises:
      UserError: neither is given, or one is not what it should be.
    """
    if workdir is None and predictions_path is None:
        raise UserError("give --workdir, --predictions or both")
    if workdir is None and shards is not None:
        raise UserError("--shards means nothing without --workdir; leave it out")
    content: dict[str, Any] = {"run": None, "predictions": None}
    if workdir is not None:
        content["run"] = run_section.content(workdir, shards)
    if predictions_path is not None:
        source = predictions.open(predictions_path)
        content["predictions"] = predictions_section.content(
            source, rule, confusion, folder
        )
    return rendering.render("report.html.j2", content)


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

    def report() -> None:
        if table.value is not None:
            files.require_other(output.value, table.value)
        matrix = None if confusion.value is None else confusions.load(confusion.value)
        with files.scratch(output.value) as folder:
            text = render(
                None if workdir.value is None else pathlib.Path(workdir.value),
                None if table.value is None else pathlib.Path(table.value),
                rule.value,
                matrix,
                folder,
                None if shards.value is None else pathlib.Path(shards.value),
            )
        files.write_text(output.value, text)
        print(f"report: {pathlib.Path(output.value).resolve()}")

    command.run(report)


if __name__ == "__main__":
    main()
