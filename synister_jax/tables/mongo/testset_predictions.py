# SPDX-License-Identifier: Apache-2.0
"""Predictions of a test set in MongoDB, both ways, and what both layouts share.

The layout is that of funkelab/synister (synister_db.py): database `<db>_predictions`,
one collection a network and split, {synapse_id, prediction: list of doubles or null}.
Ours adds the `status` of predictions.py, which the original passes over. Read back, a
document without one has status null: nobody said. The other layout is that of
brain_predictions.py.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base import files, table_metadata
from synister_jax.base.errors import UserError
from synister_jax.tables import predictions, synapses
from synister_jax.tables.mongo import databases, documents
from synister_jax.tables.mongo.documents import Document

BATCH_ROWS = databases.BATCH_DOCUMENTS


@dataclasses.dataclass(frozen=True)
class Feather:
    """A prediction table in a file, read piece by piece: it may exceed memory."""

    source: predictions.Predictions
    # Column and its value: the rows that count; None for all.
    part: tuple[str, str] | None

    @property
    def path(self) -> str:
        return str(self.source.path)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def about(self) -> dict[str, Any]:
        """What made it, without the classes."""
        return {k: v for k, v in self.source.about.items() if k != "classes"}

    def tables(self) -> Iterator[pa.Table]:
        for table in self.source.tables():
            if self.part is not None:
                column, part = self.part
                table = table.filter(pc.equal(table[column], part))
            for start in range(0, len(table), BATCH_ROWS):
                yield table.slice(start, BATCH_ROWS)

    def rows(self) -> Iterator[tuple[Document, list[float] | None]]:
        """Each row's columns and its probabilities, None where there are none."""
        names = ["synapse_id", *synapses.POSITION, "status"]
        for table in self.tables():
            values = self.probabilities(table)
            known = ~np.isnan(values).any(axis=1)
            lines = table.select(names).to_pylist()
            for line, is_known, row in zip(lines, known, values.tolist(), strict=True):
                yield line, row if is_known else None

    def probabilities(self, table: pa.Table) -> np.ndarray:
        """[n, classes] float64; every float32 is a double."""
        return predictions.probabilities(table).astype(np.float64)

    def plan(self) -> Document:
        """What tells an import from one of something else."""
        return {
            "sha256": files.sha256(self.path),
            "part": "all" if self.part is None else self.part[1],
            "classes": list(self.classes),
            "about": json.dumps(self.about),
        }

    def count(self) -> tuple[np.ndarray, int]:
        """Synapse ids, checked to be unique, and how many rows have probabilities."""
        ids, known = [], 0
        for table in self.tables():
            ids.append(table["synapse_id"].to_numpy())
            known += int((~np.isnan(self.probabilities(table)).any(axis=1)).sum())
        return synapses.check_unique(ids, self.path), known


def open_feather(path: str, split: str | None = None, part: str = "all") -> Feather:
    """Checks that the file is a prediction table, and picks a part of a split.

    Raises:
      UserError: it is none, or lacks the split.
    """
    source = predictions.open(path)
    if source.path.is_dir():
        raise UserError(f"{path} is a folder; predict with --format=feather for this")
    if part == "all":
        return Feather(source, None)
    synapses.in_part(source.schema.empty_table(), split or "", part)
    return Feather(source, (f"split_{split}", part))


def test_set_name(split: str, experiment: str, train: int, predict: int) -> str:
    """Of the collection, as the original puts it together."""
    return f"{split}_{experiment}_t{train}_p{predict}"


def check_name(collection: str) -> None:
    """Raises `UserError` for a name that no collection of predictions can have."""
    if collection == databases.IMPORTS or not re.fullmatch(
        r"[A-Za-z_][\w.-]*", collection
    ):
        raise UserError(
            f"no collection can be called {collection!r}; use letters, digits and _"
        )


def write_test_set(
    database: databases.Database, name: str, feather: Feather, overwrite: bool
) -> bool:
    """The rows as collection `name` of `<db>_predictions`; see `databases.publish`."""
    ids, _ = feather.count()
    found = (
        {
            "synapse_id": line["synapse_id"],
            "prediction": probabilities,
            "status": line["status"],
        }
        for line, probabilities in feather.rows()
    )
    # The original has no index at all, and so reads all documents for each update.
    indexes = {"synapse_id": ("synapse_id",)}
    content = databases.Content(found, len(ids), "synapse_id", indexes)
    there = _predictions_of(database)
    return databases.publish(there, name, {name: content}, feather.plan(), overwrite)


def _predictions_of(database: databases.Database) -> databases.Database:
    return database.client[f"{database.name}_predictions"]


def read_test_set(
    database: databases.Database,
    name: str,
    given_classes: Sequence[str] | None,
    source: str,
) -> tuple[pa.Schema, Iterator[pa.RecordBatch], int]:
    """Schema, rows and number of rows of a prediction table, facts from `database`.

    A null prediction is NaN in every class.

    Args:
      given_classes: in the network's order; needed where the original wrote the
        collection, which names none.
      source: where this comes from, kept in the schema's metadata.

    Raises:
      UserError: names the document that is not usable.
    """
    there = _predictions_of(database)
    record = finished(there, name, name)
    classes = classes_of(record, given_classes)
    if classes is None:
        raise UserError(
            f"nothing says what the classes of {there.name}.{name} are; give --classes "
            "in the order of the network"
        )
    skeletons, hemi_lineages = databases.read_neurons(database)
    facts = databases.synapse_schema(database)
    columns = [*map(predictions.probability_column, classes)]

    def rows() -> Iterator[Document]:
        cursor = there[name].find({}, {"_id": False})
        while several := list(itertools.islice(cursor, BATCH_ROWS)):
            wanted = {"$in": [document.get("synapse_id") for document in several]}
            found = database.synapses.find(
                {"synapse_id": wanted}, databases.SYNAPSE_FIELDS
            )
            by_id = {synapse["synapse_id"]: synapse for synapse in found}
            for document in several:
                values = _listed(document, len(columns), f"{there.name}.{name}")
                if document["synapse_id"] not in by_id:
                    raise UserError(
                        f"{there.name}.{name}: synapse {document['synapse_id']} is not "
                        f"in {database.name}.synapses"
                    )
                synapse = by_id[document["synapse_id"]]
                line = documents.row(synapse, skeletons, hemi_lineages)
                for axis in synapses.POSITION:
                    line[axis] = math.nan if line[axis] is None else line[axis]
                line["status"] = document.get("status")
                yield line | dict(zip(columns, values, strict=True))

    schema = schema_of(facts, classes, record, source)
    total = there[name].count_documents({})
    return schema, documents.in_batches(rows(), schema), total


def _listed(document: Document, classes: int, where: str) -> list[float | None]:
    try:
        documents.integer(document["synapse_id"])
        values = document["prediction"]
        if values is None:
            return [math.nan] * classes
        if not isinstance(values, list) or len(values) != classes:
            raise TypeError(f"prediction {values!r}, not a list of {classes} numbers,")
        return [documents.number(value) for value in values]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where}, synapse {document.get('synapse_id')}: {error} is missing or not "
            "usable"
        ) from None


def finished(database: databases.Database, name: str, what: str) -> Document:
    """The record of the import `what`, {} for a collection that is not of ours."""
    there = database.list_collection_names()
    record = databases.recorded(database, what)
    if record.get("state", databases.DONE) != databases.DONE:
        raise UserError(f"the import of {database.name}.{what} is unfinished: rerun it")
    if name not in there:
        raise UserError(
            f"database {database.name} has no collection {name}; it has "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    return record


def classes_of(record: Document, given: Sequence[str] | None) -> list[str] | None:
    known = record.get("classes")
    if given is None:
        return known
    synapses.check_classes(given)
    if known is not None and list(given) != known:
        raise UserError(
            f"--classes={','.join(given)}, but this was imported with the classes "
            f"{','.join(known)}; leave the flag out"
        )
    return list(given)


def schema_of(
    facts: pa.Schema, classes: Sequence[str], record: Document, source: str
) -> pa.Schema:
    fields = [*facts, pa.field("status", pa.string())]
    for name in classes:
        fields.append(pa.field(predictions.probability_column(name), pa.float32()))
    about = json.loads(record.get("about", "{}"))
    about = {"classes": list(classes), **about, "source": source}
    return pa.schema(fields, table_metadata.entry(about))
