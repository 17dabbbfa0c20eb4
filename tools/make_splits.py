# SPDX-License-Identifier: Apache-2.0
"""Splits a synapse table into train, validation and test, and reports what leaks.

    python tools/make_splits.py --synapses=fafb.feather --by=neuron --name=skeleton \
        --output=fafb.feather --report=splits

Whole neurons (hemilineages, brain regions, cell types) go to one part, so that every
class comes close to its fractions. `--report` writes report.json and balance.png; with
it and without `--by`, the split that is there is reported on.
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

_SYNAPSES = flags.DEFINE_string("synapses", None, "Synapse table.", required=True)
_NAME = flags.DEFINE_string("name", None, "Of the split.", required=True)
_BY = flags.DEFINE_enum(
    "by", None, list(synapses.GROUP_COLUMNS), "What is never in two parts."
)
_FRACTIONS = flags.DEFINE_list(
    "fractions", ["0.64", "0.16", "0.20"], "Of train, validation and test."
)
_OUTPUT = flags.DEFINE_string("output", None, "Feather or Parquet; may be the input.")
_REPORT = flags.DEFINE_string("report", None, "Folder of the report.")
_HOLD_OUT = flags.DEFINE_string(
    "hold_out", None, "Table or CSV of synapse ids to keep out of every part."
)
_HOLD_OUT_PART = flags.DEFINE_enum(
    "hold_out_part", "none", ["none", "train"], "Where these go instead."
)
_CLASSES = flags.DEFINE_list("classes", None, "Default: all in the table.")
_BALANCE = flags.DEFINE_enum(
    "balance", "synapses", ["synapses", "neurons"], "What the fractions are of."
)
_SHARED_CELL_TYPES = flags.DEFINE_bool(
    "shared_cell_types", False, "A neuron of every cell type in train, as BANC has it."
)
_PER_SYNAPSE = flags.DEFINE_bool(
    "per_synapse_fallback", False, "Split impossible classes synapse by synapse."
)
_SEED = flags.DEFINE_integer("seed", 0, "Another seed, another split.", lower_bound=0)
_TIME_LIMIT = flags.DEFINE_float("time_limit_s", 60, "Of the solver.", lower_bound=1)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the split of that name.")
_CROP_SHAPE = flags.DEFINE_list(
    "crop_shape_zyx", ["16", "160", "160"], "Voxels; for the overlaps of the report."
)
_VOXEL_SIZE = flags.DEFINE_list("voxel_size_nm_zyx", ["40", "4", "4"], "For the same.")


def main() -> None:
    table = reading.load(_SYNAPSES.value)
    by = _BY.value
    if by is None:
        if _OUTPUT.value is not None or _REPORT.value is None:
            raise UserError("give --by=… and --output to split, or --report alone")
    else:
        table = _split(table, by)
    if _REPORT.value is not None:
        _report(table, pathlib.Path(_REPORT.value))


def _split(table: pa.Table, by: str) -> pa.Table:
    column = f"split_{_NAME.value}"
    if not _NAME.value.isidentifier():
        raise UserError(f"--name={_NAME.value}: use letters, digits and _")
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
    """Refuses to write over a file of which the table has not all columns."""
    source, output = pathlib.Path(_SYNAPSES.value), pathlib.Path(written_to)
    if not source.is_file() or source.resolve() != output.resolve():
        return
    lost = set(file_formats.read(source).column_names) - set(table.column_names)
    if lost:
        raise UserError(
            f"--output={output} is the input; its {', '.join(sorted(lost))} are "
            "no columns of a synapse table and would be lost: name another --output"
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
        how += "; stopped by --time_limit_s: another machine may find another split"
    print(
        f"{_OUTPUT.value}: split_{_NAME.value}, {unit} counted; sum of relative "
        f"deviations {split.objective:.4g}, {how}; {split.seconds:.1f} s"
    )
    if split.per_synapse:
        print(f"neurons of {', '.join(split.per_synapse)} are in several parts")


def _report(table: pa.Table, folder: pathlib.Path) -> None:
    from synister_jax.base import figures  # these take a second to import
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
    print(f"crops that share voxels with one of another part: {overlapping:,} synapses")
    print(f"{folder}/report.json, {folder}/balance.png")


if __name__ == "__main__":
    command.run(main)
