# SPDX-License-Identifier: Apache-2.0
r"""Predicts every synapse of a table, or every point of a grid, in a volume.

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

from absl import flags

from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.bulk.options import FORMATS, MOST_UNIT_ROWS, UNIT_ROWS, Options


def _options() -> Options:
    """What the flags ask for; `UserError` for flags that do not go together."""
    given = flags.FLAGS
    if (given.synapses is None) == (given.roi_nm_zyx is None):
        raise UserError("give either --synapses or --roi_nm_zyx with --step_nm_zyx")
    on_grid = given.roi_nm_zyx is not None
    useless = ["part", "split", "format"] if on_grid else ["step_nm_zyx"]
    useless += ["workers"] if given.cluster is None else []
    for name in useless:
        if given[name].present:
            raise UserError(f"--{name} means nothing here; leave it out")
    return Options(
        workdirs=given.workdir,
        steps=given.step,
        volume=given.volume,
        output=given.output,
        synapses=given.synapses,
        split=given.split,
        part=given.part,
        roi_nm_zyx=given.roi_nm_zyx,
        step_nm_zyx=given.step_nm_zyx,
        voxel_size_nm_zyx=given.voxel_size_nm_zyx,
        batch_size=given.batch_size,
        views=int(given.tta),
        calibrated=given.calibrated,
        unit_rows=given.unit_rows,
        units=given.units,
        cluster=given.cluster,
        workers=given.workers,
        file_format=given.format,
        dry_run=given.dry_run,
        retry_missing=given.retry_missing,
    )


def _define_flags() -> None:
    flags.DEFINE_list("workdir", None, "Folder of the run; of several, their mean.")
    flags.DEFINE_list(
        "step", [], "Checkpoint: a number or `best`; of several, their mean."
    )
    flags.DEFINE_string("synapses", None, "Synapse table.")
    flags.DEFINE_string("split", "skeleton", "Split that --part is of.")
    flags.DEFINE_string("part", None, "Only the rows of this part of the split.")
    flags.DEFINE_list("roi_nm_zyx", None, "Region of a grid, Z0:Z1,Y0:Y1,X0:X1.")
    flags.DEFINE_list("step_nm_zyx", None, "Distances of a grid's points.")
    flags.DEFINE_string("volume", None, "Volume.")
    flags.DEFINE_list(
        "voxel_size_nm_zyx",
        None,
        "The volume's, where it is meant to differ from the network's.",
    )
    flags.DEFINE_string("output", None, "Folder of predictions.")
    flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
    flags.DEFINE_enum(
        "tta", "1", ["1", "8"], "Views of every crop; 8: mirrored and transposed."
    )
    flags.DEFINE_bool(
        "calibrated", False, "With the temperature that calibrate.py fitted."
    )
    flags.DEFINE_integer(
        "unit_rows",
        UNIT_ROWS,
        "Synapses of a work unit.",
        1,
        MOST_UNIT_ROWS,
    )
    flags.DEFINE_string("units", None, "Do the I-th of N shares only: I/N.")
    flags.DEFINE_string(
        "cluster",
        None,
        "Do the units on workers: local, slurm, lsf, or a Dask scheduler's address.",
    )
    flags.DEFINE_integer(
        "workers", 2, "Workers of --cluster=local, slurm or lsf.", lower_bound=1
    )
    flags.DEFINE_enum("format", "feather", list(FORMATS), "Of the predictions.")
    flags.DEFINE_bool("dry_run", False, "Plan, and say what it will take.")
    flags.DEFINE_bool("retry_missing", False, "Do rows again whose data was missing.")
    flags.mark_flags_as_required(["workdir", "volume", "output"])


def main() -> None:
    _define_flags()

    def run() -> None:
        options = _options()
        # JAX takes seconds to import: --help and wrong flags answer without it.
        from synister_jax.bulk import prediction

        prediction.predict(options)

    command.run(run)


if __name__ == "__main__":
    main()
