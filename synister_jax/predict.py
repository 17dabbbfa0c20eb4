# SPDX-License-Identifier: Apache-2.0
"""Predicts every synapse of a table, or every point of a grid, in a volume.

    python -m synister_jax.predict --workdir=RUN --synapses=TABLE --volume=URI \
        --output=DIR [--dry_run]
    python -m synister_jax.predict … --units=3/16                 # of an array of jobs
    python -m synister_jax.predict … --cluster=slurm --workers=8  # or one command
    python -m synister_jax.predict --workdir=RUN --volume=URI --output=DIR \
        --roi_nm_zyx=0:4000,0:8000,0:8000 --step_nm_zyx=80,80,80

Writes DIR/predictions.feather, a row for every row of the table in its order (of a grid
DIR/predictions.zarr), and DIR/predictions.json. The work is planned once into units of
neighbouring synapses; a finished unit is a file in DIR/parts and is not done again:
kill the command at any moment and rerun it. --calibrated takes the temperature that
`synister_jax.calibrate` fitted to the checkpoint.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags

from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.bulk import (
    dask_cluster,
    estimate,
    execution,
    grids,
    inputs,
    merging,
    planning,
    unit_results,
)
from synister_jax.network import checkpoint, saved_calibration
from synister_jax.tables import reading
from synister_jax.tables.batches import SynapseStream


def units_of(text: str | None, count: int) -> range:
    """The units of `--units=I/N`, I from 0: the I-th of N runs of neighbours."""
    if text is None:
        return range(count)
    index, _, shares = text.partition("/")
    if not (index.isdecimal() and shares.isdecimal() and int(index) < int(shares)):
        raise UserError(f"--units={text}: give I/N with I from 0 to N - 1, as 3/16")
    i, n = int(index), int(shares)
    return range(count * i // n, count * (i + 1) // n)


def members_of(workdirs: Sequence[str], steps: Sequence[str]) -> list[tuple[str, int]]:
    """(workdir, step) of every step in every run; the latest step where none is given.

    Raises:
      UserError: a run without such a checkpoint.
    """
    members = []
    for workdir in workdirs:
        folder = pathlib.Path(workdir)
        checkpoint.load_config(folder)  # whether it is a run at all
        for text in steps or [None]:
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


def main() -> None:
    workdir = flags.DEFINE_list(
        "workdir", None, "Folder of the run; of several, their mean."
    )
    step = flags.DEFINE_list(
        "step", [], "Checkpoint: a number or `best`; of several, their mean."
    )
    table = flags.DEFINE_string("synapses", None, "Synapse table.")
    split = flags.DEFINE_string("split", "skeleton", "Split that --part is of.")
    part = flags.DEFINE_string("part", None, "Only the rows of this part of the split.")
    roi = flags.DEFINE_list("roi_nm_zyx", None, "Region of a grid, Z0:Z1,Y0:Y1,X0:X1.")
    grid_step = flags.DEFINE_list("step_nm_zyx", None, "Distances of a grid's points.")
    volume = flags.DEFINE_string("volume", None, "Volume.")
    voxel_size = flags.DEFINE_list(
        "voxel_size_nm_zyx",
        None,
        "The volume's, where it is meant to differ from the network's.",
    )
    output = flags.DEFINE_string("output", None, "Folder of predictions.")
    batch_size = flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
    tta = flags.DEFINE_enum(
        "tta", "1", ["1", "8"], "Views of every crop; 8: mirrored and transposed."
    )
    calibrated = flags.DEFINE_bool(
        "calibrated", False, "With the temperature that calibrate.py fitted."
    )
    unit_rows = flags.DEFINE_integer(
        "unit_rows",
        planning.UNIT_ROWS,
        "Synapses of a work unit.",
        1,
        planning.MOST_UNIT_ROWS,
    )
    units = flags.DEFINE_string("units", None, "Do the I-th of N shares only: I/N.")
    cluster = flags.DEFINE_string(
        "cluster",
        None,
        "Do the units on workers: local, slurm, lsf, or a Dask scheduler's address.",
    )
    worker_count = flags.DEFINE_integer(
        "workers", 2, "Workers of --cluster=local, slurm or lsf.", lower_bound=1
    )
    file_format = flags.DEFINE_enum(
        "format", "feather", list(merging.FORMATS), "Of the predictions."
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Plan, and say what it will take.")
    retry_missing = flags.DEFINE_bool(
        "retry_missing", False, "Do rows again whose data was missing."
    )
    flags.mark_flags_as_required(["workdir", "volume", "output"])

    def run() -> None:
        if (table.value is None) == (roi.value is None):
            raise UserError("give either --synapses or --roi_nm_zyx with --step_nm_zyx")
        useless = ["step_nm_zyx"] if roi.value is None else ["part", "split", "format"]
        useless += ["workers"] if cluster.value is None else []
        for name in useless:
            if flags.FLAGS[name].present:
                raise UserError(f"--{name} means nothing here; leave it out")
        grid = None
        if roi.value is not None:
            grid = grids.Grid.of(roi.value, grid_step.value or [])
            name = f"grid {roi.value} every {grid_step.value}"
            source = SynapseStream(name, grid.batches)
        else:
            of_part = None if part.value is None else (split.value, part.value)
            source = reading.open(table.value, of_part)
        size = voxel_size.value
        if size is not None:
            size = command.three_numbers("voxel_size_nm_zyx", size, True)
        units_of(units.value, 0)  # a mistake there is told before any work
        if cluster.value is not None:
            dask_cluster.check(cluster.value)
            jax.config.update("jax_platforms", "cpu")  # accelerators are the workers'
        members, views = members_of(workdir.value, step.value), int(tta.value)
        fitted = saved_calibration.load(members, views) if calibrated.value else None
        job = inputs.Inputs(
            tuple(members),
            batch_size.value,
            views,
            volume.value,
            size,
            output.value,
            retry_missing.value,
            fitted["temperature"] if fitted else None,
        )
        classifier, opened = job.open()
        if fitted:
            [member] = classifier.members
            saved_calibration.require_parameters(fitted, member["parameters_sha256"])
        plan = planning.of_classifier(
            classifier, source, opened, pathlib.Path(output.value), unit_rows.value
        )
        # A warning only: every row is answered, those outside too.
        if plan.about["doubt"]:
            print(f"warning: {plan.about['doubt']}", file=sys.stderr)
        if dry_run.value:
            print(estimate.text(plan, classifier, opened))
            return
        mine = units_of(units.value, len(plan))
        left = unit_results.unfinished(plan, mine, job.retry_missing)
        rows = sum(map(plan.size, mine))
        done = rows - sum(left.values())
        progress = Progress("predict", rows, "synapses", done=done)
        if cluster.value is None:
            times = execution.execute(
                plan, list(left), classifier, opened, progress, job.retry_missing
            )
        else:
            do = functools.partial(inputs.execute_unit, job.elsewhere(plan))
            times = dask_cluster.execute(
                do, list(left), cluster.value, worker_count.value, progress
            )
        if left:
            whose = "" if cluster.value is None else " of all workers together"
            print(f"predict: {times.text(whose)}")
        if units.value is not None:
            shown = f"units {mine.start} to {mine.stop - 1}" if mine else "none"
            print(
                f"{shown} of {len(plan)} units: done; when all are, run the same "
                "command without --units to merge them"
            )
            return
        record = merging.finish(
            plan,
            classifier,
            source,
            opened,
            file_format.value,
            grid,
            fitted["abstain_below"] if fitted else None,
        )
        shown = ", ".join(f"{n:,} {name}" for name, n in record["status"].items())
        print(f"{output.value}/{record['file']}: {record['rows']:,} rows: {shown}")
        if record["unreadable_chunks"]:
            print(
                f"{record['unreadable_chunks']:,} chunks could not be read, see "
                f"{output.value}/unreadable_chunks.csv; --retry_missing tries again"
            )

    command.run(run)


if __name__ == "__main__":
    main()
