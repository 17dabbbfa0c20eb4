# SPDX-License-Identifier: Apache-2.0
r"""Splits a synapse table into train, validation and test, and reports leaks.

    python tools/make_splits.py --synapses=fafb.feather --by=neuron --name=skeleton \
        --output=fafb.feather --report=splits

With `--by=neuron`, all synapses of a neuron go to the same part. `--by` can also be a
hemilineage, a brain region or a cell type. The command chooses the parts so that every
class comes close to `--fractions`.

`--report` writes report.json and balance.png. They say how many synapses each part has,
and what the parts share (a leak). Without `--by`, the command makes no new split and
reports on the split that the table has already.
"""

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from absl import flags

from synister_jax.base import command, files, table_metadata
from synister_jax.base.errors import UserError
from synister_jax.tables import columns, file_formats, reading, synapses

if TYPE_CHECKING:
    from synister_jax.ground_truth import splits

_SYNAPSES = flags.DEFINE_string(
    "synapses", None, "Split this synapse table.", required=True
)
_NAME = flags.DEFINE_string(
    "name", None, "Name the split: --name=skeleton makes split_skeleton.", required=True
)
_BY = flags.DEFINE_enum(
    "by",
    None,
    list(synapses.GROUP_COLUMNS),
    "Keep all synapses of a group of this kind in one part. Without this flag, only "
    "write the report.",
)
_FRACTIONS = flags.DEFINE_list(
    "fractions",
    ["0.64", "0.16", "0.20"],
    "Put these fractions of each class into train, validation and test.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Write this Feather or Parquet file. It can be the input file."
)
_REPORT = flags.DEFINE_string("report", None, "Write a report into this folder.")
_HOLD_OUT = flags.DEFINE_string(
    "hold_out",
    None,
    "Keep the synapses of this table or CSV file (column synapse_id) out of the split.",
)
_HOLD_OUT_PART = flags.DEFINE_enum(
    "hold_out_part",
    "none",
    ["none", "train"],
    "Put the synapses of --hold_out into no part, or into train.",
)
_CLASSES = flags.DEFINE_list(
    "classes", None, "Split only these classes. The default is all in the table."
)
_BALANCE = flags.DEFINE_enum(
    "balance",
    "synapses",
    ["synapses", "neurons"],
    "Count synapses or neurons for the fractions.",
)
_SHARED_CELL_TYPES = flags.DEFINE_bool(
    "shared_cell_types",
    False,
    "Put at least one neuron of every cell type into train. This is the rule of BANC.",
)
_PER_SYNAPSE = flags.DEFINE_bool(
    "per_synapse_fallback",
    False,
    "Split a class synapse by synapse if it cannot come close to its fractions. Its "
    "neurons are then in several parts. By default such a class is an error.",
)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Make the split from this seed. Another seed gives another split.",
    lower_bound=0,
)
_TIME_LIMIT = flags.DEFINE_float(
    "time_limit_s",
    60,
    "Stop the search after this many seconds, and use the best split that it found.",
    lower_bound=1,
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace the split of this name if the table has one."
)
_CROP_SHAPE = flags.DEFINE_list(
    "crop_shape_zyx",
    ["16", "160", "160"],
    "Report the overlaps of crops with this shape in voxels.",
)
_VOXEL_SIZE = flags.DEFINE_list(
    "voxel_size_nm_zyx",
    ["40", "4", "4"],
    "Report the overlaps of crops with this voxel size in nm.",
)


def main() -> None:
    table = reading.load(_SYNAPSES.value)
    by = _BY.value
    if by is None:
        if _OUTPUT.value is not None or _REPORT.value is None:
            raise UserError(
                "to make a split, give --by=… and --output; to write only a report, "
                "give --report without --by and --output"
            )
    else:
        table = _split(table, by)
    if _REPORT.value is not None:
        _report(table, pathlib.Path(_REPORT.value))


def _split(table: pa.Table, by: str) -> pa.Table:
    column = f"split_{_NAME.value}"
    if not _NAME.value.isidentifier():
        raise UserError(f"--name={_NAME.value}: use only letters, digits and _")
    if _OUTPUT.value is None:
        raise UserError("give --output=TABLE, a .feather or .parquet file")
    synapses.check_writable(_OUTPUT.value)
    _keep_columns(table, _OUTPUT.value)
    if column in table.column_names:
        if not _OVERWRITE.value:
            raise UserError(
                f"{_SYNAPSES.value} has a split {_NAME.value} already; give "
                "--overwrite to replace it, or another --name"
            )
        table = table.drop_columns([column])
    from synister_jax.ground_truth import splits  # takes a second to import

    hold_out = None if _HOLD_OUT.value is None else _ids(_HOLD_OUT.value)
    fractions = command.three_numbers("fractions", _FRACTIONS.value)
    scheme = splits.Scheme(
        by=by,
        fractions=fractions,
        classes=_CLASSES.value,
        hold_out=hold_out,
        hold_out_part=None if _HOLD_OUT_PART.value == "none" else _HOLD_OUT_PART.value,
        balance=_BALANCE.value,
        shared_cell_types=_SHARED_CELL_TYPES.value,
        per_synapse_fallback=_PER_SYNAPSE.value,
        seed=_SEED.value,
        time_limit_s=_TIME_LIMIT.value,
    )
    split = splits.make(table, scheme)
    about = table_metadata.of(table)
    made: dict[str, Any] = {"by": by, "fractions": fractions, "seed": _SEED.value}
    made |= {"balance": _BALANCE.value, "per_synapse": list(split.per_synapse)}
    made |= {"shared_cell_types": _SHARED_CELL_TYPES.value, "hold_out": _HOLD_OUT.value}
    made |= {"objective": split.objective, "bound": split.bound}
    about.setdefault("splits", {})[_NAME.value] = made
    table = table.append_column(column, pa.array(split.parts, pa.string()))
    table = table_metadata.described(table, about)
    synapses.write(table, _OUTPUT.value)
    _print(split)
    return table


def _keep_columns(table: pa.Table, written_to: str) -> None:
    """Raises if the output is the input file and would lose columns of this file."""
    source, output = pathlib.Path(_SYNAPSES.value), pathlib.Path(written_to)
    if not source.is_file() or source.resolve() != output.resolve():
        return
    lost = set(file_formats.read(source).column_names) - set(table.column_names)
    if lost:
        raise UserError(
            f"--output={output} is also the input, and would lose columns that a "
            f"synapse table does not have: {', '.join(sorted(lost))}; name another file"
        )


def _ids(path: str) -> np.ndarray:
    table = file_formats.read(path)
    if "synapse_id" not in table.column_names:
        raise UserError(f"--hold_out={path} has no column synapse_id")
    values, missing, malformed = columns.integers(table["synapse_id"])
    if (missing | malformed).any():
        row = int(np.flatnonzero(missing | malformed)[0])
        raise UserError(f"--hold_out={path}, row {row}: synapse_id is not an integer")
    return values


def _print(split: "splits.Split") -> None:
    unit = _BALANCE.value
    print(f"{'class':<16}" + "".join(f"{part:>28}" for part in synapses.PARTS))
    for name, counts, targets in zip(
        split.classes, split.counts, split.targets, strict=True
    ):
        total = max(counts.sum(), 1)
        cells = (
            f"{count:,} of {target:,} ({count / total:.4f})"
            for count, target in zip(counts, targets, strict=True)
        )
        mark = " per synapse" if name in split.per_synapse else ""
        print(f"{name:<16}" + "".join(f"{cell:>28}" for cell in cells) + mark)
    how = "optimal" if split.optimal else f"within {split.gap:.2g} of the optimum"
    if split.stopped == "clock":
        how += "; stopped by --time_limit_s, so another machine may find another split"
    print(
        f"{_OUTPUT.value}: split_{_NAME.value}, balanced by {unit}; sum of relative "
        f"deviations {split.objective:.4g}, {how}; {split.seconds:.1f} s"
    )
    if split.per_synapse:
        print(f"neurons of {', '.join(split.per_synapse)} are in several parts")


def _report(table: pa.Table, folder: pathlib.Path) -> None:
    from synister_jax.base import figures  # both modules take a second to import
    from synister_jax.ground_truth import leakage

    shape = [
        int(size) for size in command.three_numbers("crop_shape_zyx", _CROP_SHAPE.value)
    ]
    voxel = command.three_numbers("voxel_size_nm_zyx", _VOXEL_SIZE.value)
    measured = leakage.measure(table, _NAME.value, shape, voxel, _CLASSES.value)
    files.make_folder(folder)
    known = table_metadata.of(table).get("splits", {})
    made = known.get(_NAME.value, {})
    files.write_json(folder / "report.json", {"made": made, **measured})
    fractions = made.get("fractions") or command.three_numbers(
        "fractions", _FRACTIONS.value
    )
    figure = figures.balance(measured, fractions)
    files.write_bytes(folder / "balance.png", figures.png(figure))
    for column, shared in measured["in_several_parts"].items():
        print(
            f"{column}: {shared['values']:,} in several parts, with "
            f"{shared['synapses']:,} synapses"
        )
    overlapping = measured["crops"]["synapses"]
    print(f"crops that share voxels with a crop of another part: {overlapping:,}")
    print(f"{folder}/report.json, {folder}/balance.png")


if __name__ == "__main__":
    command.run(main)
