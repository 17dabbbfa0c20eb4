# SPDX-License-Identifier: Apache-2.0
"""Predicts every synapse of a table, or every point of a grid: plan, execute, merge."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

import jax

from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.bulk import (
    dask_cluster,
    estimate,
    execution,
    grids,
    merging,
    planning,
    unit_results,
    worker_inputs,
)
from synister_jax.bulk.options import Options
from synister_jax.bulk.planning import Plan
from synister_jax.bulk.worker_inputs import Inputs
from synister_jax.em import volumes
from synister_jax.network import checkpoint, inference, saved_calibration
from synister_jax.tables import reading
from synister_jax.tables.synapse_stream import SynapseStream


def units_of(text: str | None, count: int) -> range:
    """Returns the work units of `--units=I/N`: share I of N, with I from 0.

    Args:
      text: the value of the flag; None stands for all units.
      count: the number of units of the plan.

    Raises:
      UserError: the text is not I/N.
    """
    if text is None:
        return range(count)
    index, _, shares = text.partition("/")
    if not (index.isdecimal() and shares.isdecimal() and int(index) < int(shares)):
        raise UserError(
            f"--units={text}: give I/N with I from 0 to N - 1, for example 3/16"
        )
    i, n = int(index), int(shares)
    return range(count * i // n, count * (i + 1) // n)


def members_of(workdirs: Sequence[str], steps: Sequence[str]) -> list[tuple[str, int]]:
    """Returns (workdir, step) for every run and every step.

    Args:
      workdirs: the folders of the runs.
      steps: numbers or `best`. Without any, the latest checkpoint of each run is taken.

    Raises:
      UserError: a folder is not a run, or a run has no such checkpoint.
    """
    members = []
    step: int | None
    for workdir in workdirs:
        folder = pathlib.Path(workdir)
        checkpoint.load_config(folder)  # refuses a folder that is not a run
        for text in steps or (None,):
            if text == "best":
                step = checkpoint.best_step(folder)
            elif text is None or text.isdecimal():
                step = None if text is None else int(text)
            else:
                raise UserError(f"--step={text}: give a number or `best`")
            members.append((workdir, checkpoint.choose_step(folder, step)))
    if not members:
        raise UserError("--workdir is empty; give the folder of a run")
    return members


def _source(
    options: Options,
) -> tuple[SynapseStream, grids.Grid | None]:
    """Returns the rows to predict, and the grid if the rows are its points."""
    if options.roi_nm_zyx is not None:
        grid = grids.Grid.of(options.roi_nm_zyx, options.step_nm_zyx or [])
        name = f"grid {options.roi_nm_zyx} every {options.step_nm_zyx}"
        return SynapseStream(name, grid.batches), grid
    assert options.synapses is not None  # the caller gives a table or a grid
    part = None if options.part is None else (options.split, options.part)
    return reading.open(options.synapses, part), None


@dataclasses.dataclass(frozen=True)
class _Prediction:
    """Everything that is open while the command runs."""

    inputs: Inputs
    classifier: inference.Classifier
    volume: volumes.Volume
    source: SynapseStream
    grid: grids.Grid | None
    abstain_below: float | None
    plan: Plan

    @classmethod
    def open(cls, options: Options) -> "_Prediction":
        """Opens the run, the table and the volume, and plans the work.

        Mistakes that are found quickly are found first.

        Raises:
          UserError: an option is wrong, or a file cannot be opened.
        """
        source, grid = _source(options)
        size = None
        if (texts := options.voxel_size_nm_zyx) is not None:
            size = command.three_numbers("voxel_size_nm_zyx", texts, True)
        units_of(options.units, 0)
        if options.cluster is not None:
            dask_cluster.check(options.cluster)
            # The workers need the accelerators.
            jax.config.update("jax_platforms", "cpu")
        members = members_of(options.workdirs, options.steps)
        fitted = None
        if options.calibrated:
            fitted = saved_calibration.load(members, options.views)
        opening = Inputs(
            members=tuple(members),
            batch_size=options.batch_size,
            views=options.views,
            volume=options.volume,
            voxel_size_nm_zyx=size,
            output=options.output,
            retry_missing=options.retry_missing,
            temperature=fitted["temperature"] if fitted else None,
        )
        classifier, volume = opening.open()
        if fitted:
            [member] = classifier.members
            saved_calibration.require_parameters(fitted, member["parameters_sha256"])
        plan = planning.of_classifier(
            classifier, source, volume, pathlib.Path(options.output), options.unit_rows
        )
        below = fitted["abstain_below"] if fitted else None
        return cls(opening, classifier, volume, source, grid, below, plan)


def predict(options: Options) -> None:
    """Plans the work, computes the units that are not done, and merges the results.

    Raises:
      UserError: an option is wrong, or a file cannot be opened, read or written. The
        results of finished units are kept.
    """
    prediction = _Prediction.open(options)
    plan = prediction.plan
    # This is only a warning, because rows outside the volume get an answer, too.
    if plan.about["doubt"]:
        print(f"warning: {plan.about['doubt']}", file=sys.stderr)
    if options.dry_run:
        print(estimate.text(plan, prediction.classifier, prediction.volume))
        return
    mine = units_of(options.units, len(plan))
    _execute(prediction, mine, options)
    if options.units is not None:
        shown = f"units {mine.start} to {mine.stop - 1}" if mine else "none"
        print(
            f"{shown} of {len(plan)} units: done. When all units are done, run the "
            "same command without --units to merge them"
        )
        return
    _merge(prediction, options)


def _execute(prediction: _Prediction, mine: range, options: Options) -> None:
    """Computes the units that are not done, here or on the workers of a cluster."""
    plan = prediction.plan
    left = unit_results.unfinished(plan, mine, options.retry_missing)
    rows = sum(map(plan.size, mine))
    done = rows - sum(left.values())
    progress = Progress("predict", rows, "synapses", done=done)
    if options.cluster is None:
        times = execution.execute(
            plan,
            list(left),
            prediction.classifier,
            prediction.volume,
            progress,
            options.retry_missing,
        )
    else:
        do = functools.partial(
            worker_inputs.execute_unit, prediction.inputs.elsewhere(plan)
        )
        times = dask_cluster.execute(
            do, list(left), options.cluster, options.workers, progress
        )
    if left:
        whose = "" if options.cluster is None else " of all workers together"
        print(f"predict: {times.text(whose)}")


def _merge(prediction: _Prediction, options: Options) -> None:
    record = merging.finish(
        prediction.plan,
        prediction.classifier,
        prediction.source,
        prediction.volume,
        options.file_format,
        prediction.grid,
        prediction.abstain_below,
    )
    shown = ", ".join(f"{n:,} {name}" for name, n in record["status"].items())
    print(f"{options.output}/{record['file']}: {record['rows']:,} rows: {shown}")
    if record["unreadable_chunks"]:
        print(
            f"{record['unreadable_chunks']:,} chunks could not be read, see "
            f"{options.output}/unreadable_chunks.csv; --retry_missing reads them again"
        )
