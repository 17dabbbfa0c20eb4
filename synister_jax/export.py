# SPDX-License-Identifier: Apache-2.0
r"""Writes predictions as the files that other tools of the field read.

    python -m synister_jax.export --predictions=DIR/predictions.feather \
        --to=flyem|fafbseg|cave|codex|neuprint|banc|synister --output=FOLDER
    … --to=flyem --voxel_size_nm_zyx=8,8,8 --split=skeleton \
        --confusion=RUN/evaluation/test/step-<n>/metrics.json
    … --to=synister --voxel_size_nm_zyx=40,4,4 --predict=3

--output is a folder. The files in it have their published names. export.json says what
they were made from, and is finished when all of them are complete. docs/exports.md says
what is in each file and who reads it.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

import synister_jax
from synister_jax.base import command, files, output_folders
from synister_jax.base.errors import UserError
from synister_jax.evaluation import confusions
from synister_jax.exchange import banc, export_files, flyem, flywire, neuprint, synister
from synister_jax.exchange.export_files import ExportOptions
from synister_jax.tables import predictions
from synister_jax.tables.predictions import Predictions

CONSUMERS = {
    "flyem": flyem.FLYEM,
    "fafbseg": flywire.FAFBSEG,
    "cave": flywire.CAVE,
    "codex": flywire.CODEX,
    "neuprint": neuprint.NEUPRINT,
    "banc": banc.BANC,
    "synister": synister.SYNISTER,
}
_HELP = {
    "confusion": "=RUN/evaluation/test/step-<n>/metrics.json, of the same network",
    "voxel_size_nm_zyx": ", as 8,8,8: no predictions.json next to the table gives it",
    "predict": ", the number for the names of the columns, nts_<number>.gaba",
}


def export(
    path: str,
    to: str,
    output: pathlib.Path,
    options: ExportOptions,
    drop_classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the files for the consumer `to`, and returns the content of export.json.

    Args:
      path: the predictions: a Feather file, or a folder of Parquet files.
      to: a key of `CONSUMERS`.
      drop_classes: the classes that are left out of the files.

    Raises:
      UserError: an option is missing or is not for this consumer; the folder holds
        files that were made from another table or with other options; or the table
        cannot be exported (see `export_files.prepare`).
    """
    consumer = CONSUMERS[to]
    takes = consumer.takes
    for name, value in vars(options).items():
        if value is not None and name not in takes:
            raise UserError(f"--to={to} does not take --{name}")
    opened = predictions.open(path)
    if options.voxel_size_nm_zyx is None and "voxel_size_nm_zyx" in takes:
        size = _voxel_size_nm_zyx(opened)
        options = dataclasses.replace(options, voxel_size_nm_zyx=size)
    for name, needed in takes.items():
        if needed and getattr(options, name) is None:
            raise UserError(f"--to={to} needs --{name}{_HELP[name]}")
    source = export_files.prepare(opened, to, consumer, drop_classes)
    confusion = None
    if options.confusion is not None:
        confusion = confusions.load(options.confusion).for_classes(source.classes)
    plan = {
        "to": to,
        "options": vars(options) | {"drop_classes": list(drop_classes)},
        "predictions": str(opened.path),
    }
    record = output / "export.json"
    read = [path] if options.confusion is None else [path, options.confusion]
    output_folders.claim(record, plan, [*consumer.files, "query.tmp"], read)
    done = plan | {
        "synapses": source.rows,
        "notes": consumer.write(source, output, options, confusion),
        "about": opened.about,
        "written_by": f"synister_jax {synister_jax.__version__}",
    }
    return output_folders.finish(record, done, consumer.files)


def _voxel_size_nm_zyx(source: Predictions) -> tuple[float, float, float] | None:
    """Returns the voxel size that predictions.json next to the table names, if any."""
    path = source.path.parent / "predictions.json"
    if not path.exists():
        return None
    record = files.read_json(path)
    if record.get("file", source.path.name) != source.path.name:
        return None
    size = record.get("voxel_size_nm_zyx")
    return None if size is None else tuple(size)


def main() -> None:
    path = flags.DEFINE_string(
        "predictions",
        None,
        "Export these predictions: a Feather file, or a folder of Parquet files.",
        required=True,
    )
    to = flags.DEFINE_enum(
        "to",
        None,
        list(CONSUMERS),
        "Write the files that this tool, database or project reads.",
        required=True,
    )
    output = flags.DEFINE_string(
        "output", None, "Write the files into this folder.", required=True
    )
    size = flags.DEFINE_list(
        "voxel_size_nm_zyx",
        None,
        "Write positions in voxels of this size: Z,Y,X in nm. By default the voxel "
        "size of the volume, if predictions.json is next to the table.",
    )
    confusion = flags.DEFINE_string(
        "confusion",
        None,
        "Use this confusion matrix of the same network: metrics.json of the test part, "
        "its folder RUN/evaluation/test, or a CSV whose rows are the true classes. "
        "--to=flyem needs it, and --to=neuprint takes it.",
    )
    split = flags.DEFINE_string(
        "split", None, "Tell FlyEM which part of this split each synapse belongs to."
    )
    predict = flags.DEFINE_integer(
        "predict",
        None,
        "Write this predict number of the original system into the names of the "
        "columns: with 3, nts_3.gaba.",
    )
    drop_classes = flags.DEFINE_list(
        "drop_classes",
        [],
        "Leave these classes out of the files. The probabilities of the others stay as "
        "they are.",
    )

    def run() -> None:
        three = None
        if size.value is not None:
            three = command.three_numbers(size.name, size.value, True)
        options = ExportOptions(three, confusion.value, split.value, predict.value)
        folder = pathlib.Path(output.value)
        done = export(path.value, to.value, folder, options, drop_classes.value)
        for note in done["notes"]:
            print(f"note: {note}")
        rows = done["synapses"]
        print(f"{folder}: files for {to.value} of {rows:,} synapses")

    command.run(run)


if __name__ == "__main__":
    main()
