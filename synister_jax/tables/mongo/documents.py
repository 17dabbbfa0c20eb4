# SPDX-License-Identifier: Apache-2.0
"""The original system's documents, and the synapse table made of them and back.

Three collections, in MongoDB and in the JSON export v3 alike (funkelab/synister,
synister_db.py): `synapses` refer to `skeletons` (neurons; they hold the known
transmitters), which refer to `hemi_lineages`. Nothing here talks to a server or a file.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base.errors import UserError

Document = dict[str, Any]

# Order of writing: what a document refers to is there before it.
COLLECTIONS = ("hemi_lineages", "skeletons", "synapses")
ID_FIELDS = {
    "hemi_lineages": "hemi_lineage_id",
    "skeletons": "skeleton_id",
    "synapses": "synapse_id",
}
# Name and fields of each index that the original makes, all sparse, none unique.
INDEXES: dict[str, dict[str, tuple[str, ...]]] = {
    "hemi_lineages": {"hemi_lineage_id": ("hemi_lineage_id",)},
    "skeletons": {
        "skeleton_id": ("skeleton_id",),
        "hemi_lineage_id": ("hemi_lineage_id",),
    },
    "synapses": {
        "pos": ("z", "y", "x"),
        "synapse_id": ("synapse_id",),
        "skeleton_id": ("skeleton_id",),
    },
}
# The fields that each document has, whether known or not.
_TEMPLATES: dict[str, Document] = {
    "hemi_lineages": {"hemi_lineage_name": None, "nt_guess": None},
    "skeletons": {"hemi_lineage_id": None, "nt_known": None},
    "synapses": {
        "x": None,
        "y": None,
        "z": None,
        "skeleton_id": None,
        "splits": None,
        "prepost": None,
        "meta_id": None,
        "brain_region": None,
    },
}
# Names that the original system reads as "no hemilineage".
_NO_HEMILINEAGE = re.compile(r"(|NA|NONE|NEW|UNKNOWN\d?)", re.IGNORECASE)
_OF_A_NEURON = ("neurotransmitter", "hemilineage", "cell_type")
_BATCH_ROWS = 10_000


def complete(collection: str, key: int, fields: Document) -> Document:
    """The document of `collection` with all its fields, the id first."""
    return {ID_FIELDS[collection]: key, **_TEMPLATES[collection], **fields}


def row(
    synapse: Document,
    skeletons: Mapping[int, Document],
    hemi_lineages: Mapping[int, Document],
) -> Document:
    """One synapse document as a row of the synapse table, in nm as stored.

    Raises:
      UserError: a field is missing or is not usable, or refers to nothing.
    """
    try:
        neuron_id = synapse["skeleton_id"]
        skeleton = {}
        if neuron_id is not None:
            skeleton = _referred(skeletons, neuron_id, "skeleton")
        known = skeleton.get("nt_known") or []
        if not isinstance(known, list | tuple):
            raise TypeError(f"nt_known {known!r} of skeleton {neuron_id}, not a list,")
        hemi_lineage = {}
        if skeleton.get("hemi_lineage_id") is not None:
            hemi_lineage = _referred(
                hemi_lineages, skeleton["hemi_lineage_id"], "hemi_lineage"
            )
        name = hemi_lineage.get("hemi_lineage_name") or ""
        parts = synapse.get("splits") or {}
        return {
            "synapse_id": integer(synapse["synapse_id"]),
            "z_nm": number(synapse["z"]),
            "y_nm": number(synapse["y"]),
            "x_nm": number(synapse["x"]),
            "neuron_id": neuron_id,
            "neurotransmitter": "+".join(known) or None,
            "hemilineage": None if _NO_HEMILINEAGE.fullmatch(name) else name,
            "brain_region": synapse.get("brain_region") or None,
            "cell_type": skeleton.get("type") or None,
            **{f"split_{scheme}": part for scheme, part in parts.items()},
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"synapse {synapse.get('synapse_id')}: {error} is missing or not usable; "
            "it needs synapse_id, skeleton_id (a known skeleton or null), x, y and z"
        ) from None


def _referred(collection: Mapping[int, Document], key: Any, what: str) -> Document:
    if integer(key) not in collection:
        raise KeyError(f"{what} {key}")
    return collection[key]


def integer(value: Any) -> int:
    """The id as it is; `TypeError` for what is none."""
    # Doubles have lost digits of large ids; True is an int to Python.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"id {value!r}, not an integer,")
    return value


def number(value: Any) -> float | None:
    """A coordinate, None where it is null; `TypeError` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"coordinate {value!r}, not a number,")
    return None if value is None else float(value)


def from_table(table: pa.Table) -> dict[str, list[Document] | Iterator[Document]]:
    """The documents of each collection, `synapses` one by one in the table's order.

    Whole nanometres become integers, as the original stores them; others stay doubles.
    Hemilineages are numbered from 0 in order of appearance, and "none" is one of them,
    as in the original's ingest.py. Read back, an empty text is null, and so is a
    hemilineage called NA, NONE, NEW or UNKNOWN: to the original these are none.

    Raises:
      UserError: the rows of a neuron disagree about it, or a row says something of a
        neuron that it does not name: the original's layout has no place for that.
    """
    neurons = _neurons(table)
    names = list(dict.fromkeys(neuron["hemilineage"] for neuron in neurons))
    hemi_lineages = [
        complete("hemi_lineages", index, {"hemi_lineage_name": name})
        for index, name in enumerate(names)
    ]
    index_of = {name: index for index, name in enumerate(names)}
    skeletons = []
    for neuron in neurons:
        known = neuron["neurotransmitter"]
        fields = {
            "hemi_lineage_id": index_of[neuron["hemilineage"]],
            "nt_known": None if known is None else known.split("+"),
        }
        if neuron["cell_type"] is not None:
            fields["type"] = neuron["cell_type"]
        skeletons.append(complete("skeletons", neuron["neuron_id"], fields))
    return {
        "hemi_lineages": hemi_lineages,
        "skeletons": skeletons,
        "synapses": synapse_documents(table),
    }


def synapse_documents(table: pa.Table) -> Iterator[Document]:
    """One `synapses` document a row of the table, in its order."""
    schemes = [name for name in table.column_names if name.startswith("split_")]
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        for line in batch.to_pylist():
            parts = {
                name.removeprefix("split_"): line[name]
                for name in schemes
                if line[name] is not None
            }
            fields = {
                "x": whole_if_whole(line["x_nm"]),
                "y": whole_if_whole(line["y_nm"]),
                "z": whole_if_whole(line["z_nm"]),
                "skeleton_id": line["neuron_id"],
                "splits": parts or None,
                "brain_region": line["brain_region"],
            }
            yield complete("synapses", line["synapse_id"], fields)


def whole_if_whole(value: float | None) -> int | float | None:
    """An integer where the number is one; None where it is NaN or infinite."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _neurons(table: pa.Table) -> list[Document]:
    """{neuron_id, neurotransmitter, hemilineage, cell_type} in order of appearance."""
    lost = pc.is_valid(table[_OF_A_NEURON[0]])
    for name in _OF_A_NEURON[1:]:
        lost = pc.or_(lost, pc.is_valid(table[name]))
    lost = table.filter(pc.and_(lost, pc.is_null(table["neuron_id"])))
    if len(lost):
        raise UserError(
            f"{len(lost):,} rows have no neuron_id but a {', '.join(_OF_A_NEURON)} "
            f"(synapse {lost['synapse_id'][0]} first); the original's layout keeps "
            "these with the neuron: give the rows a neuron_id"
        )
    facts = table.filter(pc.is_valid(table["neuron_id"])).select(
        ["neuron_id", *_OF_A_NEURON]
    )
    distinct = facts.group_by(facts.column_names, use_threads=False).aggregate([])
    seen: dict[int, Document] = {}
    for neuron in distinct.to_pylist():
        other = seen.setdefault(neuron["neuron_id"], neuron)
        if other is not neuron:
            [name, *_] = [n for n in _OF_A_NEURON if neuron[n] != other[n]]
            raise UserError(
                f"neuron {neuron['neuron_id']} has two values of {name}: "
                f"{other[name]!r} and {neuron[name]!r}; make its rows agree"
            )
    return list(seen.values())


def to_batches(
    synapses: Iterable[Document],
    skeletons: Mapping[int, Document],
    hemi_lineages: Mapping[int, Document],
    schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:
    """Rows of the synapse table in batches of `schema`, in bounded memory.

    Raises:
      UserError: see `row`; or a value does not fit its column.
    """
    rows = (row(synapse, skeletons, hemi_lineages) for synapse in synapses)
    return in_batches(rows, schema)


def in_batches(rows: Iterable[Document], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows with a `synapse_id` as batches; a column that a row lacks is null there.

    Raises:
      UserError: a value does not fit its column, or has none.
    """
    names = set(schema.names)
    unfit = (pa.ArrowException, OverflowError, TypeError, ValueError)
    several: list[Document] = []

    def batch() -> pa.RecordBatch:
        with contextlib.suppress(*unfit):
            return pa.RecordBatch.from_pylist(several, schema=schema)
        for line in several:
            for field in schema:
                try:
                    pa.array([line.get(field.name)], field.type)
                except unfit as error:
                    raise UserError(
                        f"synapse {line['synapse_id']}: {field.name}: {error}"
                    ) from None
        raise AssertionError("each value fits and all together do not")

    for line in rows:
        several.append(line)
        if unforeseen := line.keys() - names:
            raise UserError(
                f"synapse {line['synapse_id']} has {', '.join(unforeseen)}, which was "
                "not there when reading began; stop whatever writes and rerun"
            )
        if len(several) == _BATCH_ROWS:
            yield batch()
            several = []
    if several:
        yield batch()
