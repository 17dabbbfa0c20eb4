# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the predictions of a test set in MongoDB.

funkelab/synister (synister_db.py) defines the layout. The database `<db>_predictions`
has a collection for each network and split, with the documents {synapse_id, prediction:
list of doubles or null}. This project also writes the `status` of predictions.py. The
original ignores this field. A document without this field is read with the status null.

brain_predictions.py has the other layout, and uses some functions of this module.
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
    """A prediction table in a file, which is read in pieces and can exceed memory."""

    source: predictions.Predictions
    # (column, value): use only the rows with this value. None uses all rows.
    part: tuple[str, str] | None

    @property
    def path(self) -> str:
        """The path of the file."""
        return str(self.source.path)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the network's outputs."""
        return self.source.classes

    @property
    def about(self) -> dict[str, Any]:
        """The metadata that says what made the predictions, without the classes."""
        return {k: v for k, v in self.source.about.items() if k != "classes"}

    def tables(self) -> Iterator[pa.Table]:
        """Yields the rows in tables of at most `BATCH_ROWS` rows."""
        for table in self.source.tables():
            if self.part is not None:
                column, part = self.part
                table = table.filter(pc.equal(table[column], part))
            for start in range(0, len(table), BATCH_ROWS):
                yield table.slice(start, BATCH_ROWS)

    def rows(self) -> Iterator[tuple[Document, list[float] | None]]:
        """Yields the id, position and status of each row, and its probabilities.

        The probabilities are None if the row has no prediction.
        """
        names = ["synapse_id", *synapses.POSITION, "status"]
        for table in self.tables():
            values = self.probabilities(table)
            known = ~np.isnan(values).any(axis=1)
            lines = table.select(names).to_pylist()
            for line, is_known, row in zip(lines, known, values.tolist(), strict=True):
                yield line, row if is_known else None

    def probabilities(self, table: pa.Table) -> np.ndarray:
        """Returns the probabilities as float64, [n, classes], which loses no digits."""
        return predictions.probabilities(table).astype(np.float64)

    def plan(self) -> Document:
        """Returns what the import is made from, to recognise another import."""
        return {
            "sha256": files.sha256(self.path),
            "part": "all" if self.part is None else self.part[1],
            "classes": list(self.classes),
            "about": json.dumps(self.about),
        }

    def count(self) -> tuple[np.ndarray, int]:
        """Returns the synapse ids, and the number of rows with probabilities.

        Raises:
          UserError: an id occurs twice.
        """
        ids, known = [], 0
        for table in self.tables():
            ids.append(table["synapse_id"].to_numpy())
            known += int((~np.isnan(self.probabilities(table)).any(axis=1)).sum())
        return synapses.check_unique(ids, self.path), known


def open_feather(path: str, split: str | None = None, part: str = "all") -> Feather:
    """Opens a prediction table in a file, and selects a part of a split.

    Args:
      path: the file.
      split: the split that `part` belongs to.
      part: train, validation or test, or "all" for all rows.

    Raises:
      UserError: the file is not a prediction table or does not have the split, or
        `path` is a folder.
    """
    source = predictions.open(path)
    if source.path.is_dir():
        raise UserError(
            f"{path} is a folder; predict with --format=feather to get one file"
        )
    if part == "all":
        return Feather(source, None)
    synapses.in_part(source.schema.empty_table(), split or "", part)
    return Feather(source, (f"split_{split}", part))


def test_set_name(split: str, experiment: str, train: int, predict: int) -> str:
    """Returns the name that the original gives to the collection."""
    return f"{split}_{experiment}_t{train}_p{predict}"


def check_name(collection: str) -> None:
    """Raises `UserError` if a collection of predictions cannot have this name."""
    if collection == databases.IMPORTS or not re.fullmatch(
        r"[A-Za-z_][\w.-]*", collection
    ):
        raise UserError(
            f"no collection can be called {collection!r}; use letters, digits and _"
        )


def write_test_set(
    database: databases.Database, name: str, feather: Feather, overwrite: bool
) -> bool:
    """Writes predictions into the collection `name` of `<db>_predictions`.

    Args:
      database: the database of the ground truth, <db>.
      overwrite: replace the collection if it has other documents.

    Returns:
      False if the collection already has exactly these predictions, else True.

    Raises:
      UserError: a synapse id occurs twice, or `databases.publish` raises it.
    """
    ids, _ = feather.count()
    found = (
        {
            "synapse_id": line["synapse_id"],
            "prediction": probabilities,
            "status": line["status"],
        }
        for line, probabilities in feather.rows()
    )
    # The original has no index, so it reads all documents for each update.
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
    """Returns the schema, the rows and the number of rows of a prediction table.

    The columns of the synapse table come from `database`. A null prediction becomes NaN
    for every class.

    Args:
      database: the database of the ground truth, <db>.
      name: the collection in `<db>_predictions`.
      given_classes: the classes in the network's order. This is needed for a collection
        that the original wrote, because the original does not store the classes.
      source: where the predictions come from. The metadata of the schema keeps this.

    Raises:
      UserError: the import is unfinished, the collection is missing, the classes are
        not known or differ, or a document is not usable. The message names it.
    """
    there = _predictions_of(database)
    record = finished(there, name, name)
    classes = classes_of(record, given_classes)
    if classes is None:
        raise UserError(
            f"nothing says what the classes of {there.name}.{name} are; give --classes "
            "in the order of the network's outputs"
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
                        f"in {database.name}.synapses; import the synapse table of "
                        "these predictions first"
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
    """Returns the record of the import `what`, or {} for a collection without a record.

    Raises:
      UserError: the import is unfinished, or there is no collection `name`.
    """
    there = database.list_collection_names()
    record = databases.recorded(database, what)
    if record.get("state", databases.DONE) != databases.DONE:
        raise UserError(
            f"the import of {database.name}.{what} is unfinished; run the import again"
        )
    if name not in there:
        raise UserError(
            f"database {database.name} has no collection {name}; it has "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    return record


def classes_of(record: Document, given: Sequence[str] | None) -> list[str] | None:
    """Returns the given classes, else those that the import recorded, else None.

    Raises:
      UserError: a given class is unknown or given twice, or the given classes are not
        those of the import.
    """
    known = record.get("classes")
    if given is None:
        return known
    synapses.check_classes(given)
    if known is not None and list(given) != known:
        raise UserError(
            f"--classes={','.join(given)}, but the predictions were imported with the "
            f"classes {','.join(known)}; leave the flag out"
        )
    return list(given)


def schema_of(
    facts: pa.Schema, classes: Sequence[str], record: Document, source: str
) -> pa.Schema:
    """Returns the schema of a prediction table.

    Args:
      facts: the columns of the synapse table.
      classes: the class names in the order of the network's outputs.
      record: the record of the import, whose metadata is kept.
      source: where the predictions come from.
    """
    fields = [*facts, pa.field("status", pa.string())]
    for name in classes:
        fields.append(pa.field(predictions.probability_column(name), pa.float32()))
    about = json.loads(record.get("about", "{}"))
    about = {"classes": list(classes), **about, "source": source}
    return pa.schema(fields, table_metadata.entry(about))
