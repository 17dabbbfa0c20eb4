# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML page about a run, about predictions, or about both."""

import pathlib
from typing import Any

from synister_jax.base.errors import UserError
from synister_jax.evaluation import metrics
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
    """Returns the page as text.

    Args:
      workdir: a run. The page shows what it was trained on, its curves, and what
        `evaluate` and `calibrate` wrote.
      predictions_path: predictions of any size. The page lists their neurons.
      rule: the rule that calls the neurons, a key of `voting_rules.RULES`.
      confusion: the confusion matrix of the network, for the rules that need one.
      folder: a folder on a disk with room for what does not fit into memory.
      shards: the shards of the run, if they were moved after training.

    Raises:
      UserError: neither a run nor predictions are given, or one of them cannot be read.
    """
    if workdir is None and predictions_path is None:
        raise UserError("give --workdir, --predictions or both")
    if workdir is None and shards is not None:
        raise UserError("--shards has no effect without --workdir; leave --shards out")
    content: dict[str, Any] = {"run": None, "predictions": None}
    if workdir is not None:
        content["run"] = run_section.content(workdir, shards)
    if predictions_path is not None:
        source = predictions.open(predictions_path)
        content["predictions"] = predictions_section.content(
            source, rule, confusion, folder
        )
    return rendering.render("report.html.j2", content)
