# SPDX-License-Identifier: Apache-2.0
r"""Predicts every synapse of a table, or every point of a grid, in a volume.

    python -m synister_jax.predict --workdir=RUN --synapses=TABLE --volume=URI \
        --output=DIR [--dry_run]
    python -m synister_jax.predict … --units=3/16                 # job 3 of an array
    python -m synister_jax.predict … --cluster=slurm --workers=8  # or one command
    python -m synister_jax.predict --workdir=RUN --volume=URI --output=DIR \
        --roi_nm_zyx=0:4000,0:8000,0:8000 --step_nm_zyx=80,80,80

The command writes DIR/predictions.feather, with one row for every row of the table, in
the same order. For a grid it writes DIR/predictions.zarr. DIR/predictions.json says how
the predictions were made.

The work is planned once, into units of neighbouring synapses. A finished unit is a file
in DIR/parts and is not computed again. So you can kill the command at any time and type
it again.
"""

from absl import flags

from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.bulk.options import FORMATS, MOST_UNIT_ROWS, UNIT_ROWS, Options


def _options() -> Options:
    """Returns what the flags ask for.

    Raises:
      UserError: flags that do not go together.
    """
    given = flags.FLAGS
    if (given.synapses is None) == (given.roi_nm_zyx is None):
        raise UserError(
            "give either --synapses, or both --roi_nm_zyx and --step_nm_zyx"
        )
    on_grid = given.roi_nm_zyx is not None
    useless = ["part", "split", "format"] if on_grid else ["step_nm_zyx"]
    useless += ["workers"] if given.cluster is None else []
    for name in useless:
        if given[name].present:
            raise UserError(
                f"--{name} means nothing with the other flags; leave --{name} out"
            )
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
    flags.DEFINE_list(
        "workdir",
        None,
        "Predict with the network of the run in this folder. With several folders, "
        "separated by commas, the prediction is the mean over their networks.",
    )
    flags.DEFINE_list(
        "step",
        [],
        "Use the checkpoint of this step, or `best` for the best on validation. By "
        "default the latest. With several steps the prediction is the mean.",
    )
    flags.DEFINE_string("synapses", None, "Predict the synapses of this table.")
    flags.DEFINE_string(
        "split",
        "skeleton",
        "Take --part from this split of the table, that is, from its column "
        "split_NAME.",
    )
    flags.DEFINE_string(
        "part",
        None,
        "Predict only the rows of this part of the split: train, validation or test.",
    )
    flags.DEFINE_list(
        "roi_nm_zyx",
        None,
        "Predict the points of a grid in this region instead of a table: "
        "Z0:Z1,Y0:Y1,X0:X1 in nm.",
    )
    flags.DEFINE_list(
        "step_nm_zyx", None, "Put the points of the grid this far apart: Z,Y,X in nm."
    )
    flags.DEFINE_string(
        "volume",
        None,
        "Read the crops from this volume: a folder, or an address that starts with "
        "https, gs or s3.",
    )
    flags.DEFINE_list(
        "voxel_size_nm_zyx",
        None,
        "Accept a volume with this voxel size (Z,Y,X in nm), although the network was "
        "trained on another.",
    )
    flags.DEFINE_string("output", None, "Write the predictions into this folder.")
    flags.DEFINE_integer(
        "batch_size", 32, "Classify this many crops at once.", lower_bound=1
    )
    flags.DEFINE_enum(
        "tta",
        "1",
        ["1", "8"],
        "Classify every crop in this many views, and take the mean. 8 views are the "
        "crop mirrored and transposed in y and x. They take eight times as long.",
    )
    flags.DEFINE_bool(
        "calibrated",
        False,
        "Divide the logits by the temperature that `synister_jax.calibrate` fitted to "
        "the checkpoint.",
    )
    flags.DEFINE_integer(
        "unit_rows",
        UNIT_ROWS,
        "Put this many synapses into a work unit. A unit is lost as a whole when the "
        "command is killed.",
        1,
        MOST_UNIT_ROWS,
    )
    flags.DEFINE_string(
        "units",
        None,
        "Compute only share I of N of the work units, with I from 0: I/N, for example "
        "3/16. When all shares are done, run the command once without this flag.",
    )
    flags.DEFINE_string(
        "cluster",
        None,
        "Compute the work units on workers that this command starts: local, slurm or "
        "lsf; or on those of the Dask scheduler at this address.",
    )
    flags.DEFINE_integer(
        "workers",
        2,
        "Start this many workers with --cluster=local, slurm or lsf.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "format",
        "feather",
        list(FORMATS),
        "Write the predictions as one Feather file, or as a folder of Parquet files.",
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Only plan the work, print how long it will take, and stop.",
    )
    flags.DEFINE_bool(
        "retry_missing",
        False,
        "Read the volume again for rows whose status is missing_data.",
    )
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
