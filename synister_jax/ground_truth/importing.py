# SPDX-License-Identifier: Apache-2.0
"""Imports the ground truth of the published data sets as a synapse table.

Each data set has its own dialect. The columns and rules come from
funkelab/synister_data (consolidate.py, ingest.py), and for BANC from
htem/synister_banc. This module differs from these programs in five points:

- Cantor ids are exact.
- Positions keep their fractions of a nanometre.
- Classes are counted after duplicates are dropped.
- If one row of a neuron has no known transmitter, the whole neuron is dropped. The
  original drops only this row and the rows after it.
- Every dropped row is listed with its reason.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base import table_metadata
from synister_jax.base.errors import UserError
from synister_jax.em import spaces
from synister_jax.ground_truth.dialects import Dialect
from synister_jax.ground_truth.row_filter import RowFilter
from synister_jax.tables import columns, file_formats, ids_from_positions, synapses

if TYPE_CHECKING:
    from synister_jax.em.volumes import Volume


# Other names that the sources use. None means that the transmitter is not known, and
# "kc" stands for Kenyon cells.
_SYNONYMS = {
    "kc_acetylcholine": "acetylcholine",
    "ach": "acetylcholine",
    "glut": "glutamate",
    "ser": "serotonin",
    "oct": "octopamine",
    "da": "dopamine",
    "unclear": None,
    "others": None,
}
MINIMUM_SYNAPSES, MINIMUM_NEURONS = 1_000, 3  # per class, as in ingest.py


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """The synapse table, the dropped rows of the sources, and a report with counts."""

    table: pa.Table
    dropped: pa.Table  # columns: file, row (from 0), synapse_id, neuron_id, reason
    report: dict[str, Any]


_FACTS = ("hemilineage", "brain_region", "cell_type")


def read(
    paths: Sequence[pathlib.Path],
    dialect: Dialect,
    *,
    space: spaces.Space | None = None,
    volume: "Volume | None" = None,
    minimum_synapses: int = MINIMUM_SYNAPSES,
    minimum_neurons: int = MINIMUM_NEURONS,
    keep_unknown: bool = False,
    drop_bad_rows: bool = False,
) -> GroundTruth:
    """Reads the files of one source as one synapse table.

    Args:
      paths: the files.
      dialect: the columns and rules of the source.
      space: the frame of the coordinates; by default, the frame of the dialect.
      volume: the volume, which is needed only to know the length of a flipped axis.
      minimum_synapses: drop classes with fewer synapses.
      minimum_neurons: drop classes with fewer neurons.
      keep_unknown: keep neurons that have no known transmitter in any row.
      drop_bad_rows: drop and list bad rows, which otherwise raise an error.

    Raises:
      UserError: a file cannot be read, lacks a column or has a bad row; the message
        names the file, the rows and the reason.
    """
    space = space or spaces.SPACES[dialect.space]
    read_files = [_standard(path, dialect, space) for path in paths]
    tables = [table for table, _ in read_files]
    rows = pa.concat_tables(tables, promote_options="default")
    row_filter = RowFilter(rows, drop_bad_rows)
    bad = rows["bad_neuron_id"].to_numpy()
    if dialect.neuron_needed:
        bad |= pc.is_null(rows["neuron_id"]).to_numpy()
    row_filter.refuse(bad, "the neuron id is not a whole number (floats lose digits)")
    neurotransmitter = _transmitters(rows, row_filter, keep_unknown)
    row_filter.drop(
        rows["small"].to_numpy(), f"size below {dialect.smallest_size} or missing"
    )
    xyz = {name: rows[name].to_numpy() for name in "xyz"}
    lacking = np.any(np.isnan(list(xyz.values())), axis=0)
    row_filter.refuse(lacking, "a coordinate is missing or not a number")
    position = spaces.to_volume(space, xyz, volume.shape_zyx if volume else None)
    synapse_id = _synapse_ids(rows, row_filter, dialect, xyz, position)
    table = pa.table(
        {
            "synapse_id": synapse_id,
            **dict(zip(synapses.POSITION, position.T, strict=True)),
            "neuron_id": rows["neuron_id"],
            "neurotransmitter": neurotransmitter,
            **{n: rows[n] for n in _FACTS},
            **{n: rows[n] for n in synapses.split_columns(rows)},
        }
    )
    for name in synapses.split_columns(rows):
        bad = pc.invert(
            pc.is_in(rows[name], value_set=pa.array([*synapses.PARTS, None]))
        )
        row_filter.refuse(bad.to_numpy(), f"{name} is not {', '.join(synapses.PARTS)}")
    _drop_duplicates(table, row_filter)
    _drop_small_classes(table, row_filter, minimum_synapses, minimum_neurons)
    table, several = _one_to_a_neuron(table.filter(row_filter.kept))
    done = spaces.describe(space, volume.shape_zyx if volume else None)
    about = {"space": f"{space.frame}, nm", "made_by": done}
    about["inputs"] = [str(path) for path in paths]
    table = table_metadata.described(table, about)
    nameless = pc.is_null(rows["synapse_id"]).to_numpy() & (synapse_id == 0)
    dropped = row_filter.dropped(pa.array(synapse_id, mask=nameless))
    table = synapses.conform(table, " and ".join(map(str, paths)))
    absent = {str(p): a for p, (_, a) in zip(paths, read_files, strict=True) if a}
    report = about | {"absent_columns": absent, "first_value_taken": several}
    report |= summary(table, dropped)
    return GroundTruth(table, dropped, report)


def summary(table: pa.Table, dropped: pa.Table | None = None) -> dict[str, Any]:
    """Counts the synapses, neurons and classes of a table, and its dropped rows.

    Returns:
      synapses, neurons: their numbers.
      classes: the numbers of synapses and neurons of each class.
      dropped: the number of dropped rows for each reason.
    """
    reasons = [] if dropped is None else dropped["reason"].value_counts().to_pylist()
    classes = table.group_by("neurotransmitter").aggregate(
        [("synapse_id", "count"), ("neuron_id", "count_distinct")]
    )
    return {
        "synapses": len(table),
        "neurons": pc.count_distinct(table["neuron_id"]).as_py(),
        "classes": {
            row["neurotransmitter"] or "unknown": {
                "synapses": row["synapse_id_count"],
                "neurons": row["neuron_id_count_distinct"],
            }
            for row in classes.sort_by("neurotransmitter").to_pylist()
        },
        "dropped": {reason["values"]: reason["counts"] for reason in reasons},
    }


def _standard(
    path: pathlib.Path, dialect: Dialect, space: spaces.Space
) -> tuple[pa.Table, list[str]]:
    """Reads a file, and returns its table and the optional columns that it lacks.

    The table has the same columns for all dialects.
    """
    table = file_formats.read(path)
    if space != spaces.SPACES["volume"] and table_metadata.of(table):
        raise UserError(
            f"{path} is a synapse table, whose positions are already in the volume "
            "frame; read it with --source=table and without --space, --scale_nm_zyx or "
            "--offset_nm_zyx"
        )
    absent: list[str] = []

    def column(*names: str) -> list[pa.ChunkedArray]:
        """Returns the named columns that the file has.

        If the file has none of them and all are optional, the result is one column of
        nulls.
        """
        there = [table[name] for name in names if name in table.column_names]
        if there:
            return there
        if not set(names) <= {"", *dialect.may_lack}:
            raise UserError(
                f"{path} has no column {' or '.join(names)}; the columns of the file "
                f"are {', '.join(table.column_names)}"
            )
        absent.extend(filter(None, names))
        return [pa.chunked_array([pa.nulls(len(table), pa.string())])]

    synapse, bad_synapse = _ids(column(dialect.synapse_id))
    neuron, bad_neuron = _ids(column(*dialect.neuron_id))
    known = _labels(path, table, dialect)
    if dialect.verified and dialect.verified in table.column_names:
        is_true = pc.equal(pc.utf8_lower(columns.text(table[dialect.verified])), "true")
        known = pc.if_else(pc.fill_null(is_true, False), known, None)
    small = np.zeros(len(table), bool)
    if dialect.smallest_size:
        small = ~(columns.numbers(column("size")[0]) >= dialect.smallest_size)
    standard = {
        "file": pa.array([str(path)] * len(table), pa.string()),
        "row": np.arange(len(table)),
        "synapse_id": synapse,
        "bad_synapse_id": bad_synapse,
        "neuron_id": neuron,
        "bad_neuron_id": bad_neuron,
        "neurotransmitter": known,
        "small": small,
    }
    for name in _FACTS:
        standard[name] = columns.text(column(getattr(dialect, name))[0])
    if dialect.splits:
        for name in synapses.split_columns(table):
            standard[name] = columns.text(table[name])
    for axis, name in zip("xyz", dialect.xyz, strict=True):
        # Synapse tables of this project name the unit in the column, as in x_nm.
        nm = f"{axis}_nm"
        is_ours = name not in table.column_names and nm in table.column_names
        standard[axis] = columns.numbers(column(nm if is_ours else name)[0])
    return pa.table(standard), absent


def _ids(candidates: Sequence[pa.ChunkedArray]) -> tuple[pa.Array, np.ndarray]:
    """Returns the first known id of each row, and whether an id is malformed.

    The id is null where no column has an id, or where an id is malformed.
    """
    values, missing, malformed = columns.integers(candidates[0])
    for column in candidates[1:]:
        others, other_missing, other_malformed = columns.integers(column)
        values = np.where(missing, others, values)
        malformed |= missing & other_malformed
        missing &= other_missing
    return pa.array(values, mask=missing | malformed), malformed


def _labels(path: pathlib.Path, table: pa.Table, dialect: Dialect) -> pa.ChunkedArray:
    """Returns the transmitter of each row as the source writes it; null if unknown."""
    if not dialect.neurotransmitter:
        name = path.name.split(".")[0]
        return columns.text(pa.chunked_array([pa.array([name] * len(table))]))
    for names in dialect.neurotransmitter:
        if set(names) <= set(table.column_names):
            return pc.coalesce(*(columns.text(table[name]) for name in names))
    if {*sum(dialect.neurotransmitter, ())} <= {*dialect.may_lack}:
        return pa.chunked_array([pa.nulls(len(table), pa.string())])
    choices = " or ".join(" and ".join(names) for names in dialect.neurotransmitter)
    raise UserError(
        f"{path} has no column {choices}; the columns of the file are "
        f"{', '.join(table.column_names)}"
    )


def _transmitters(
    rows: pa.Table, row_filter: RowFilter, keep_unknown: bool
) -> pa.Array:
    """Returns the class name of each row; null where the transmitter is unknown.

    Several transmitters of a row are joined by `+`. All kept rows of a neuron have the
    same class name.
    """
    said = pc.dictionary_encode(rows["neurotransmitter"]).combine_chunks()
    names = [_class_name(text) for text in said.dictionary.to_pylist()]
    index = pc.fill_null(said.indices, len(names)).to_numpy(zero_copy_only=False)
    values = np.array([*names, None], object)[index]
    for text, name in zip(said.dictionary.to_pylist(), names, strict=True):
        for part in [] if name is None else name.split("+"):
            if part not in synapses.NEUROTRANSMITTERS:
                known = ", ".join(synapses.NEUROTRANSMITTERS)
                why = f"unknown neurotransmitter {text!r} (known: {known})"
                row_filter.refuse(values == name, why)
    kinds, code = np.unique(values.astype(str), return_inverse=True)
    code = np.where(values == None, -1, code)  # noqa: E711 - element by element
    lowest, highest = _over_neuron(rows, row_filter, code)
    row_filter.drop(
        (lowest < 0) & (highest >= 0), "a row of its neuron has no transmitter"
    )
    row_filter.refuse(
        (lowest != highest) & (lowest >= 0),
        "other rows of its neuron name another transmitter",
    )
    if not keep_unknown:
        row_filter.drop(highest < 0, "no known neurotransmitter")
    return pa.array(values, pa.string())


def _class_name(text: str) -> str | None:
    parts = [part.strip() for part in text.lower().split("+")]
    names = {_SYNONYMS.get(part, part) for part in parts}
    known = sorted(name for name in names if name is not None)
    return "+".join(known) if len(known) == len(names) else None


def _over_neuron(
    rows: pa.Table, row_filter: RowFilter, code: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest code among the rows of each row's neuron."""
    lowest, highest = code.copy(), code.copy()
    at = np.flatnonzero(pc.is_valid(rows["neuron_id"]).to_numpy() & row_filter.kept)
    neurons, member = np.unique(rows["neuron_id"].take(at), return_inverse=True)
    low, high = np.full(len(neurons), len(code)), np.full(len(neurons), -1)
    np.minimum.at(low, member, code[at])
    np.maximum.at(high, member, code[at])
    lowest[at], highest[at] = low[member], high[member]
    return lowest, highest


def _synapse_ids(
    rows: pa.Table,
    row_filter: RowFilter,
    dialect: Dialect,
    xyz: Mapping[str, np.ndarray],
    position_nm_zyx: np.ndarray,
) -> np.ndarray:
    """Returns the synapse ids, [n] int64.

    Where the source has no id, the id is computed from the position.
    """
    ids = pc.fill_null(rows["synapse_id"], 0).to_numpy().copy()
    row_filter.refuse(
        rows["bad_synapse_id"].to_numpy(),
        "the synapse id is not a whole number (floats lose digits)",
    )
    missing = pc.is_null(rows["synapse_id"]).to_numpy() & row_filter.kept
    if dialect.neuprint_ids:
        index = np.stack([xyz["z"], xyz["y"], xyz["x"]], axis=1)
        whole = (index == np.trunc(index)).all(axis=1)
        made = ids_from_positions.neuprint(np.where(whole[:, None], index, -1))
        row_filter.refuse(made < 0, "a coordinate is not a voxel from 0 to 2097151")
        differs = ~missing & (made != ids)
        row_filter.refuse(
            differs, "the synapse id does not match its voxel; digits were lost"
        )
        return np.where(missing, made, ids)
    if dialect.voxel_size_nm_zyx is None:
        row_filter.refuse(
            missing,
            "no synapse id; give --voxel_size_nm_zyx to compute ids from voxels",
        )
        return ids
    # The original also truncates to whole nanometres first (ingest.py).
    index = np.trunc(position_nm_zyx) // dialect.voxel_size_nm_zyx
    fits = ids_from_positions.cantor_fits(index)
    row_filter.refuse(
        missing & ~fits,
        "no synapse id, and its voxel is negative or too large to compute an id",
    )
    ids[missing & fits] = ids_from_positions.cantor(index[missing & fits])
    return ids


def _drop_duplicates(table: pa.Table, row_filter: RowFilter) -> None:
    """Drops repeated rows and conflicting rows.

    One of several identical rows stays. If rows with one synapse id differ, all of them
    are dropped.
    """
    at = np.flatnonzero(row_filter.kept)
    _, member, count = np.unique(
        table["synapse_id"].to_numpy()[at], return_inverse=True, return_counts=True
    )
    at = at[count[member] > 1]
    again = table.take(at).append_column("at", pa.array(at))
    names = table.column_names
    distinct = again.group_by(names).aggregate([("at", "min")])
    _, member, count = np.unique(
        distinct["synapse_id"], return_inverse=True, return_counts=True
    )
    ids = distinct["synapse_id"].to_numpy()[count[member] > 1]
    conflicting = np.zeros(len(table), bool)
    conflicting[at] = np.isin(again["synapse_id"], ids)
    row_filter.drop(conflicting, "conflicting rows of one synapse id")
    repeated = np.zeros(len(table), bool)
    repeated[at] = True
    repeated[distinct["at_min"].to_numpy()] = False
    row_filter.drop(repeated, "repeats an identical row")


def _one_to_a_neuron(table: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Gives all rows of a neuron the neuron's first known hemilineage and cell type.

    The program ingest.py also uses the values of a neuron's first synapse. The function
    returns the table, and for each column how many neurons had several values.
    """
    several = {}
    for name in ("hemilineage", "cell_type"):
        known = table.filter(
            pc.and_(*map(pc.is_valid, (table[name], table["neuron_id"])))
        )
        first = known.group_by("neuron_id", use_threads=False).aggregate(
            [(name, "first"), (name, "count_distinct")]
        )
        at = pc.index_in(table["neuron_id"], first["neuron_id"].combine_chunks())
        values = pc.coalesce(first[f"{name}_first"].take(at), table[name])
        table = table.set_column(table.column_names.index(name), name, values)
        if count := pc.sum(pc.greater(first[f"{name}_count_distinct"], 1)).as_py():
            several[name] = count
    return table, several


def _drop_small_classes(
    table: pa.Table, row_filter: RowFilter, minimum_synapses: int, minimum_neurons: int
) -> None:
    for name, count in summary(table.filter(row_filter.kept))["classes"].items():
        enough = count["synapses"] >= minimum_synapses
        if enough and count["neurons"] >= minimum_neurons:
            continue
        rows = pc.fill_null(pc.equal(table["neurotransmitter"], name), False)
        row_filter.drop(
            rows.to_numpy(),
            f"{name}: only {count['synapses']:,} synapses of {count['neurons']:,} "
            f"neurons (needed: {minimum_synapses:,} of {minimum_neurons:,})",
        )
