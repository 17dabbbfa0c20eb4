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
