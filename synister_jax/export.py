# SPDX-License-Identifier: Apache-2.0
"""Writes predictions as the files that other tools of the field read.

    python -m synister_jax.export --predictions=DIR/predictions.feather \
        --to=flyem|fafbseg|cave|codex|neuprint|banc|synister --output=FOLDER
    … --to=flyem --voxel_size_nm_zyx=8,8,8 --split=skeleton \
        --confusion=RUN/evaluation/test/step-<n>/metrics.json
    … --to=synister --voxel_size_nm_zyx=40,4,4 --predict=3

--output is always a folder, with the published names of the files in it and
export.json, which says what they were made of and, in the end, that they are all there.
docs/exports.md says what is in each file and who reads it.
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
    "voxel_size_nm_zyx": ", as 8,8,8: no predictions.json beside the table says it",
    "predict": ", the number in nts_<number>.gaba",
}


def export(
    path: str,
    to: str,
    output: pathlib.Path,
    options: ExportOptions,
    drop_classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the files of consumer `to`; returns the content of export.json.

    Raises:
      UserError: an option that is missing or does not count; a folder whose files are
        not of this table and these options; see `export_files.prepare`.
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
    """Of the volume, where `predict` left its record beside the table."""
    path = source.path.parent / "predictions.json"
    if not path.exists():
        return None
    record = files.read_json(path)
    if record.get("file", source.path.name) != source.path.name:
        return None
    size = record.get("voxel_size_nm_zyx")
    return None if size is None else tuple(size)


def main() -> None:
    path = flags.DEFINE_string("predictions", None, "Prediction table.", required=True)
    to = flags.DEFINE_enum(
        "to", None, list(CONSUMERS), "Who is to read it.", required=True
    )
    output = flags.DEFINE_string("output", None, "Folder for the files.", required=True)
    size = flags.DEFINE_list(
        "voxel_size_nm_zyx", None, "Voxels that positions are to be in."
    )
    confusion = flags.DEFINE_string(
        "confusion", None, "metrics.json of the test part, or CSV (rows true)."
    )
    split = flags.DEFINE_string("split", None, "Split whose parts FlyEM is told.")
    predict = flags.DEFINE_integer(
        "predict", None, "The original's number of the prediction."
    )
    drop_classes = flags.DEFINE_list(
        "drop_classes", [], "Classes to leave out; nothing is rescaled."
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
