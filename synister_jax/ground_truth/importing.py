# SPDX-License-Identifier: Apache-2.0
"""Ground truth of the published data sets, each in its own dialect, as a synapse table.

The columns and rules are those of funkelab/synister_data (consolidate.py, ingest.py)
and, for BANC, htem/synister_banc. Where ours differ: Cantor ids are exact; positions
keep their fractions of a nanometre; classes are counted after duplicates are gone; a
neuron with an unknown row is left out whole, not from that row on; and every row left
out is listed with its reason.
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


# Other names in use; None is "not known". "kc" are the Kenyon cells.
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
MINIMUM_SYNAPSES, MINIMUM_NEURONS = 1_000, 3  # of a class, as in ingest.py


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """The table, every row of the sources that is not in it, and what was counted."""

    table: pa.Table
    dropped: pa.Table  # file, row (from 0), synapse_id, neuron_id, reason
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
      space: of the coordinates, in place of the dialect's.
      volume: gives the length of a flipped axis.
      minimum_synapses, minimum_neurons: of a class; smaller classes are dropped.
      keep_unknown: keep neurons none of whose rows knows a transmitter.
      drop_bad_rows: drop and list what would otherwise be an error.

    Raises:
      UserError: names the file, the rows and the reason.
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
    """Counts of a synapse table: rows, neurons, classes, and why rows are not in it."""
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
    """A file with one set of columns for all dialects, and the columns it lacks."""
    table = file_formats.read(path)
    if space != spaces.SPACES["volume"] and table_metadata.of(table):
        raise UserError(
            f"{path} is a synapse table, in its volume's frame already; read it with "
            "--source=table and without --space, --scale_nm_zyx or --offset_nm_zyx"
        )
    absent: list[str] = []

    def column(*names: str) -> list[pa.ChunkedArray]:
        """Those of the columns that are there; one of nulls where none need be."""
        there = [table[name] for name in names if name in table.column_names]
        if there:
            return there
        if not set(names) <= {"", *dialect.may_lack}:
            raise UserError(
                f"{path} has no column {' or '.join(names)}; it has "
                f"{', '.join(table.column_names)}"
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
        # Our own tables say the unit.
        nm = f"{axis}_nm"
        is_ours = name not in table.column_names and nm in table.column_names
        standard[axis] = columns.numbers(column(nm if is_ours else name)[0])
    return pa.table(standard), absent


def _ids(candidates: Sequence[pa.ChunkedArray]) -> tuple[pa.Array, np.ndarray]:
    """The first known id of each row, null where none is, and which are malformed."""
    values, missing, malformed = columns.integers(candidates[0])
    for column in candidates[1:]:
        others, other_missing, other_malformed = columns.integers(column)
        values = np.where(missing, others, values)
        malformed |= missing & other_malformed
        missing &= other_missing
    return pa.array(values, mask=missing | malformed), malformed


def _labels(path: pathlib.Path, table: pa.Table, dialect: Dialect) -> pa.ChunkedArray:
    """What the source says of each row's transmitter, as text; null for unknown."""
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
        f"{path} has no column {choices}; it has {', '.join(table.column_names)}"
    )


def _transmitters(
    rows: pa.Table, row_filter: RowFilter, keep_unknown: bool
) -> pa.Array:
    """Class names (several joined by `+`), null for unknown; one to a neuron."""
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
        (lowest < 0) & (highest >= 0), "neuron partly without a transmitter"
    )
    row_filter.refuse(
        (lowest != highest) & (lowest >= 0),
        "rows of its neuron name other transmitters",
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
    """Lowest and highest code among the rows that each row shares its neuron with."""
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
    """[n] int64; made of the position where the source has none."""
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
        row_filter.refuse(made < 0, "coordinates are not voxels of 0 to 2097151")
        differs = ~missing & (made != ids)
        row_filter.refuse(differs, "the id is not that of its voxel; digits were lost")
        return np.where(missing, made, ids)
    if dialect.voxel_size_nm_zyx is None:
        row_filter.refuse(
            missing, "no synapse id; --voxel_size_nm_zyx makes ids of voxels"
        )
        return ids
    # The original truncates to whole nm first (ingest.py).
    index = np.trunc(position_nm_zyx) // dialect.voxel_size_nm_zyx
    fits = ids_from_positions.cantor_fits(index)
    row_filter.refuse(
        missing & ~fits, "no synapse id, and no voxel that one is made of"
    )
    ids[missing & fits] = ids_from_positions.cantor(index[missing & fits])
    return ids


def _drop_duplicates(table: pa.Table, row_filter: RowFilter) -> None:
    """Of identical rows one stays; rows that say different things of an id all go."""
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
    row_filter.drop(repeated, "identical row again")


def _one_to_a_neuron(table: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Each neuron's first known hemilineage and cell type in all of its rows.

    As ingest.py takes them of a neuron's first synapse. Also tells how many neurons
    had several.
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
