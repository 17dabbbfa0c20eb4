# SPDX-License-Identifier: Apache-2.0
"""Brings ground truth of any source into a synapse table.

    python tools/import_synapses.py --source=malevnc \
        --input=acetylcholine.csv.gz,gaba.csv.gz,glutamate.csv.gz \
        --output=malevnc.feather
    python tools/import_synapses.py --source=table --input=mine.csv --space=volume \
        --columns=synapse_id=id,neuron_id=body,neurotransmitter=nt \
        --scale_nm_zyx=40,4,4 --output=mine.feather

Beside the table it writes what is not in it: `<output>.dropped.feather`, a row for each
row left out, with the reason; and `<output>.report.json`, the counts.
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
    "Whose layout the input has.",
    required=True,
)
_INPUT = flags.DEFINE_list("input", None, "Files, or an export folder.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Feather or Parquet.", required=True)
_SPACE = flags.DEFINE_enum(
    "space", None, list(spaces.SPACES), "Of the coordinates, if not the source's own."
)
_SCALE = flags.DEFINE_list(
    "scale_nm_zyx", None, "nm of one step of a coordinate (voxel size, for voxels)."
)
_OFFSET = flags.DEFINE_list("offset_nm_zyx", None, "Added to the coordinates, in nm.")
_COLUMNS = flags.DEFINE_list(
    "columns", [], "For --source=table: ours=theirs, as neuron_id=body,x=pre_x."
)
_VOXEL_SIZE = flags.DEFINE_list(
    "voxel_size_nm_zyx", None, "Make missing ids of the voxel, of this size."
)
_VOLUME = flags.DEFINE_string("volume", None, "Check that the positions lie in it.")
_MINIMUM_SYNAPSES = flags.DEFINE_integer(
    "minimum_synapses", importing.MINIMUM_SYNAPSES, "Of a class.", lower_bound=0
)
_MINIMUM_NEURONS = flags.DEFINE_integer(
    "minimum_neurons", importing.MINIMUM_NEURONS, "Of a class.", lower_bound=0
)
_KEEP_UNKNOWN = flags.DEFINE_bool(
    "keep_unknown", False, "Keep neurons whose transmitter is not known."
)
_DROP_BAD_ROWS = flags.DEFINE_bool(
    "drop_bad_rows", False, "Leave out and list rows that would be an error."
)


def main() -> None:
    output = pathlib.Path(_OUTPUT.value)
    synapses.check_writable(output)
    if not _INPUT.value:
        raise UserError("--input is empty; name one or more files")
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
        raise UserError(f"no synapse is left for {output}: {why or 'no rows'}")
    synapses.write(result.table, output)
    _print(output, report)


# What an export v3, already in its volume's frame and taken as it is, has no use for.
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
    """As published: nothing is left out."""
    for name in _NOT_OF_EXPORT:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} does nothing for --source=export-v3; remove it")
    if len(_INPUT.value) != 1:
        raise UserError("--source=export-v3 takes one folder as --input")
    folder = pathlib.Path(_INPUT.value[0])
    if not folder.is_dir():
        raise UserError(f"--input={folder} is not a folder of an export v3")
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
            raise UserError("--columns: write pairs ours=theirs, as neuron_id=body")
        mapping = {ours: theirs for ours, _, theirs in pairs}
        if len(mapping) < len(pairs):
            raise UserError("--columns names one of our columns twice")
        dialect = dialects.of_table(mapping)
    elif _COLUMNS.value:
        raise UserError("--columns is for --source=table; this source has its own")
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
    """What the flags say; None leaves it to the source."""
    own = [_SCALE.value, _OFFSET.value] != [None, None]
    if own and _SOURCE.value != "table":
        raise UserError("--scale_nm_zyx and --offset_nm_zyx are for --source=table")
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
    """How many lie outside; an error where the unit or the axes seem mistaken."""
    positions = synapses.positions_nm_zyx(result.table)
    outside = spaces.outside(positions, volume)
    if doubt := spaces.doubt(positions, volume, least_share=0):
        ids = result.table["synapse_id"].filter(outside).to_pylist()
        more = ", …" if len(ids) > 5 else ""
        raise UserError(
            f"{doubt}; check --space and --scale_nm_zyx, or mend these: synapse_id "
            f"{', '.join(map(str, ids[:5]))}{more}"
        )
    if spaces.look_like_voxels(positions, volume):
        print(
            "warning: all positions lie where their voxel indices would: if they are "
            "voxels, give --scale_nm_zyx",
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
        print(f"  {count:,} neurons have several values of {column}; the first counts")
    for path, absent in report.get("absent_columns", {}).items():
        print(f"  not there: {', '.join(absent)} in {path}")
    if report.get("outside_volume"):
        print(f"  outside the volume: {report['outside_volume']:,}")


if __name__ == "__main__":
    command.run(main)
