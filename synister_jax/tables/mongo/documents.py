# SPDX-License-Identifier: Apache-2.0
"""Converts the documents of the original system to a synapse table, and back.

MongoDB and the JSON export v3 have the same three collections (funkelab/synister,
synister_db.py). A document of `synapses` refers to a document of `skeletons`, which is
a neuron and holds its known transmitters. A document of `skeletons` refers to a
document of `hemi_lineages`. This module uses neither a server nor files.
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

# The order of writing: a document is written after the documents that it refers to.
COLLECTIONS = ("hemi_lineages", "skeletons", "synapses")
ID_FIELDS = {
    "hemi_lineages": "hemi_lineage_id",
    "skeletons": "skeleton_id",
    "synapses": "synapse_id",
}
# The name and the fields of each index of the original. All are sparse, none is unique.
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
# The fields that every document has. Unknown values are null.
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
    """Returns a document of `collection` with all its fields, the id first."""
    return {ID_FIELDS[collection]: key, **_TEMPLATES[collection], **fields}


def row(
    synapse: Document,
    skeletons: Mapping[int, Document],
    hemi_lineages: Mapping[int, Document],
) -> Document:
    """Returns a synapse document as a row of the synapse table.

    The position is in nm, as in the document.

    Args:
      synapse: the document.
      skeletons: the documents of `skeletons` by id.
      hemi_lineages: the documents of `hemi_lineages` by id.

    Raises:
      UserError: a field is missing or not usable, or refers to a missing document.
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
            "a synapse needs synapse_id, skeleton_id (a known skeleton or null), x, y "
            "and z"
        ) from None


def _referred(collection: Mapping[int, Document], key: Any, what: str) -> Document:
    if integer(key) not in collection:
        raise KeyError(f"{what} {key}")
    return collection[key]


def integer(value: Any) -> int:
    """Returns the id unchanged.

    Raises:
      TypeError: it is not an integer.
    """
    # A double has lost digits of a large id. For Python, True is an int.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"id {value!r}, not an integer,")
    return value


def number(value: Any) -> float | None:
    """Returns a number as a float, or None if it is null.

    Raises:
      TypeError: it is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"coordinate {value!r}, not a number,")
    return None if value is None else float(value)


def from_table(table: pa.Table) -> dict[str, list[Document] | Iterator[Document]]:
    """Returns the documents of each collection for a synapse table.

    The documents of `synapses` are created one by one, in the order of the table. Whole
    nanometres become integers, as the original stores them. Other positions stay
    doubles. Hemilineages are numbered from 0 in order of appearance. A missing
    hemilineage gets a number, too, as in ingest.py of the original.

    Some values change when the documents are read back. An empty text becomes null. A
    hemilineage called NA, NONE, NEW or UNKNOWN becomes null, because the original reads
    these names as "no hemilineage".

    Raises:
      UserError: the rows of a neuron disagree about the neuron. Or a row has a property
        of a neuron but no `neuron_id`: the original's layout cannot hold this.
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
    """Yields a document of `synapses` for each row of the table, in the same order."""
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
    """Returns an integer for a whole number below 2**53, and None for NaN or infinity.

    Every other number is returned unchanged.
    """
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _neurons(table: pa.Table) -> list[Document]:
    """Returns the properties of each neuron, in order of appearance.

    The keys are neuron_id, neurotransmitter, hemilineage and cell_type.
    """
    lost = pc.is_valid(table[_OF_A_NEURON[0]])
    for name in _OF_A_NEURON[1:]:
        lost = pc.or_(lost, pc.is_valid(table[name]))
    lost = table.filter(pc.and_(lost, pc.is_null(table["neuron_id"])))
    if len(lost):
        raise UserError(
            f"{len(lost):,} rows have no neuron_id, but have a value in one of the "
            f"columns {', '.join(_OF_A_NEURON)} (the first is synapse "
            f"{lost['synapse_id'][0]}); the original's layout stores these values with "
            "the neuron: give the rows a neuron_id, or remove the values"
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
                f"{other[name]!r} and {neuron[name]!r}; give all its rows the same "
                "value"
            )
    return list(seen.values())


def to_batches(
    synapses: Iterable[Document],
    skeletons: Mapping[int, Document],
    hemi_lineages: Mapping[int, Document],
    schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of the synapse table in batches of `schema`.

    The memory does not grow with the number of synapses.

    Args:
      synapses: the documents of `synapses`.
      skeletons: the documents of `skeletons` by id.
      hemi_lineages: the documents of `hemi_lineages` by id.

    Raises:
      UserError: `row` or `in_batches` raises it.
    """
    rows = (row(synapse, skeletons, hemi_lineages) for synapse in synapses)
    return in_batches(rows, schema)


def in_batches(rows: Iterable[Document], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yields rows as batches. A value that a row lacks becomes null.

    Args:
      rows: the rows, each with a `synapse_id`.

    Raises:
      UserError: a value does not fit its column, or `schema` has no column for it.
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
        raise AssertionError("every value fits its column, but the batch does not fit")

    for line in rows:
        several.append(line)
        if unforeseen := line.keys() - names:
            raise UserError(
                f"synapse {line['synapse_id']} has {', '.join(unforeseen)}, which no "
                "synapse had when the reading began; stop the program that writes to "
                "the database and run again"
            )
        if len(several) == _BATCH_ROWS:
            yield batch()
            several = []
    if several:
        yield batch()
