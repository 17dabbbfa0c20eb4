# SPDX-License-Identifier: Apache-2.0
r"""Converts the ground truth of a source to a synapse table.

    python tools/import_synapses.py --source=malevnc \
        --input=acetylcholine.csv.gz,gaba.csv.gz,glutamate.csv.gz \
        --output=malevnc.feather
    python tools/import_synapses.py --source=table --input=mine.csv --space=volume \
        --columns=synapse_id=id,neuron_id=body,neurotransmitter=nt \
        --scale_nm_zyx=40,4,4 --output=mine.feather

Next to the table, the command writes two more files. `<output>.dropped.feather` lists
each row that was left out, and the reason. `<output>.report.json` has the counts.
"""

import dataclasses
import pathlib
import sys

from absl import flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.em import spaces, volumes
from synister_jax.ground_truth import dialects, importing, row_filter
from synister_jax.tables import reading, synapses
from synister_jax.tables.mongo import json_export

_SOURCE = flags.DEFINE_enum(
    "source",
    None,
    ["export-v3", *dialects.DIALECTS, "table"],
    "Read the input in the layout of this source; `table` reads any table.",
    required=True,
)
_INPUT = flags.DEFINE_list(
    "input",
    None,
    "Read these files, or the folder of an export v3.",
    required=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Write this Feather or Parquet file.", required=True
)
_SPACE = flags.DEFINE_enum(
    "space",
    None,
    list(spaces.SPACES),
    "Read the coordinates in this space, and not in the usual space of the source.",
)
_SCALE = flags.DEFINE_list(
    "scale_nm_zyx",
    None,
    "Multiply the coordinates by these factors. For voxels, give the voxel size in nm. "
    "By default the coordinates are in nm. Only for --source=table.",
)
_OFFSET = flags.DEFINE_list(
    "offset_nm_zyx",
    None,
    "Add these lengths in nm to the scaled coordinates. Only for --source=table.",
)
_COLUMNS = flags.DEFINE_list(
    "columns",
    [],
    "Name the columns of the input for --source=table, as pairs ours=theirs: "
    "`--columns=neuron_id=body,x=pre_x`.",
)
_VOXEL_SIZE = flags.DEFINE_list(
    "voxel_size_nm_zyx",
    None,
    "Compute each missing synapse id from the voxel of the synapse, with this voxel "
    "size in nm.",
)
_VOLUME = flags.DEFINE_string(
    "volume",
    None,
    "Check that the positions are inside this volume. Spaces with a mirrored axis need "
    "the volume.",
)
_MINIMUM_SYNAPSES = flags.DEFINE_integer(
    "minimum_synapses",
    importing.MINIMUM_SYNAPSES,
    "Leave out the classes that have fewer synapses.",
    lower_bound=0,
)
_MINIMUM_NEURONS = flags.DEFINE_integer(
    "minimum_neurons",
    importing.MINIMUM_NEURONS,
    "Leave out the classes that have fewer neurons.",
    lower_bound=0,
)
_KEEP_UNKNOWN = flags.DEFINE_bool(
    "keep_unknown", False, "Keep the neurons whose neurotransmitter is not known."
)
_DROP_BAD_ROWS = flags.DEFINE_bool(
    "drop_bad_rows",
    False,
    "Leave out bad rows and list them. By default a bad row is an error.",
)


def main() -> None:
    output = pathlib.Path(_OUTPUT.value)
    synapses.check_writable(output)
    if not _INPUT.value:
        raise UserError("--input is empty; give one or more files")
    files.make_folder(output.parent)
    volume = None if _VOLUME.value is None else volumes.open(_VOLUME.value)
    if _SOURCE.value == "export-v3":
        result = _export_v3()
    else:
        result = importing.read(
            [pathlib.Path(path) for path in _INPUT.value],
            _dialect(),
            space=_space(),
            volume=volume,
            minimum_synapses=_MINIMUM_SYNAPSES.value,
            minimum_neurons=_MINIMUM_NEURONS.value,
            keep_unknown=_KEEP_UNKNOWN.value,
            drop_bad_rows=_DROP_BAD_ROWS.value,
        )
    report = {"source": _SOURCE.value, **result.report}
    if volume is not None:
        report["outside_volume"] = _check_positions(result, volume)
    files.write_feather(output.with_suffix(".dropped.feather"), result.dropped)
    files.write_json(output.with_suffix(".report.json"), report)
    if not len(result.table):
        why = "; ".join(f"{n:,} rows: {why}" for why, n in report["dropped"].items())
        raise UserError(
            f"no synapse is left for {output}: {why or 'the input has no rows'}"
        )
    synapses.write(result.table, output)
    _print(output, report)


# The flags that --source=export-v3 does not use. The coordinates of an export v3 are in
# the volume frame already, and all rows are kept.
_NOT_OF_EXPORT = (
    "space",
    "scale_nm_zyx",
    "offset_nm_zyx",
    "columns",
    "voxel_size_nm_zyx",
    "minimum_synapses",
    "minimum_neurons",
    "keep_unknown",
    "drop_bad_rows",
)


def _export_v3() -> importing.GroundTruth:
    """Reads a folder with an export v3 and keeps all rows."""
    for name in _NOT_OF_EXPORT:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} does nothing for --source=export-v3; remove it")
    if len(_INPUT.value) != 1:
        raise UserError("--source=export-v3 needs exactly one folder as --input")
    folder = pathlib.Path(_INPUT.value[0])
    if not folder.is_dir():
        raise UserError(f"--input={folder} is not a folder with an export v3")
    table = reading.load(folder)
    different = json_export.unpublished(folder)
    for name, how in different.items():
        print(f"warning: {folder / name} {how} from the published one", file=sys.stderr)
    report = {"inputs": [str(folder)], "unpublished": different}
    report |= importing.summary(table)
    return importing.GroundTruth(table, row_filter.NOTHING_DROPPED, report)


def _dialect() -> dialects.Dialect:
    if _SOURCE.value == "table":
        pairs = [pair.partition("=") for pair in _COLUMNS.value]
        if not all(ours and theirs for ours, _, theirs in pairs):
            raise UserError("--columns needs pairs ours=theirs, like neuron_id=body")
        mapping = {ours: theirs for ours, _, theirs in pairs}
        if len(mapping) < len(pairs):
            raise UserError("--columns names a column of the synapse table twice")
        dialect = dialects.of_table(mapping)
    elif _COLUMNS.value:
        raise UserError("--columns is only for --source=table; remove it")
    else:
        dialect = dialects.DIALECTS[_SOURCE.value]
    if _VOXEL_SIZE.value is None:
        return dialect
    size = command.three_numbers("voxel_size_nm_zyx", _VOXEL_SIZE.value, positive=True)
    return dataclasses.replace(
        dialect,
        voxel_size_nm_zyx=size,
        may_lack=(*dialect.may_lack, dialect.synapse_id),
    )


def _space() -> spaces.Space | None:
    """Returns the space that the flags describe, or None for the source's own."""
    own = [_SCALE.value, _OFFSET.value] != [None, None]
    if own and _SOURCE.value != "table":
        raise UserError(
            "--scale_nm_zyx and --offset_nm_zyx are for --source=table; remove them"
        )
    if own and _SPACE.value not in (None, "volume"):
        raise UserError("give --space or --scale_nm_zyx and --offset_nm_zyx, not both")
    if own:
        scale = command.three_numbers(
            "scale_nm_zyx", _SCALE.value or ["1"] * 3, positive=True
        )
        offset = command.three_numbers("offset_nm_zyx", _OFFSET.value or ["0"] * 3)
        return spaces.Space("the volume", scale, offset)
    return None if _SPACE.value is None else spaces.SPACES[_SPACE.value]


def _check_positions(result: importing.GroundTruth, volume: volumes.Volume) -> int:
    """Returns how many positions are outside the volume.

    Raises if the unit or the order of the axes seems to be wrong.
    """
    positions = synapses.positions_nm_zyx(result.table)
    outside = spaces.outside(positions, volume)
    if doubt := spaces.doubt(positions, volume, least_share=0):
        ids = result.table["synapse_id"].filter(outside).to_pylist()
        more = ", …" if len(ids) > 5 else ""
        raise UserError(
            f"{doubt}; check --space and --scale_nm_zyx, or correct these: synapse_id "
            f"{', '.join(map(str, ids[:5]))}{more}"
        )
    if spaces.look_like_voxels(positions, volume):
        print(
            "warning: all positions would also be inside the volume as voxel indices; "
            "if they are voxels, give --scale_nm_zyx",
            file=sys.stderr,
        )
    return int(outside.sum())


def _print(output: pathlib.Path, report: dict) -> None:
    print(f"{output}: {report['synapses']:,} synapses of {report['neurons']:,} neurons")
    for name, count in report["classes"].items():
        synapse_count, neurons = count["synapses"], count["neurons"]
        print(f"  {name:<16}{synapse_count:>12,} synapses {neurons:>8,} neurons")
    for reason, count in report["dropped"].items():
        print(f"  left out: {count:,} rows: {reason}")
    for column, count in report.get("first_value_taken", {}).items():
        print(f"  {count:,} neurons have several values of {column}; the first is used")
    for path, absent in report.get("absent_columns", {}).items():
        print(f"  missing columns: {', '.join(absent)} in {path}")
    if report.get("outside_volume"):
        print(f"  outside the volume: {report['outside_volume']:,} positions")


if __name__ == "__main__":
    command.run(main)
