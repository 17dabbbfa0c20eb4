# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the predictions of a whole brain in MongoDB.

funkelab/synisterbrain (brain_db.py) defines the layout. A collection of any name has
the documents {id, pre_x, pre_y, pre_z in nm}. Each network adds the field nts_<number>:
{class: probability}. This project also writes the `status` of predictions.py, as
status_<number>. The original ignores this field. A document without this field is read
with the status null.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.tables import predictions, synapses
from synister_jax.tables.mongo import databases, documents, testset_predictions
from synister_jax.tables.mongo.documents import Document
from synister_jax.tables.mongo.testset_predictions import Feather

_PRE = {"z_nm": "pre_z", "y_nm": "pre_y", "x_nm": "pre_x"}


def write_brain(
    database: databases.Database,
    name: str,
    number: int,
    feather: Feather,
    overwrite: bool,
) -> bool:
    """Writes predictions into a new collection, or as nts_<number> of an existing one.

    A row without probabilities gets no nts_<number>, as in the original.

    Args:
      name: the collection.
      number: the number of the network.
      feather: the predictions.
      overwrite: replace nts_<number> in the whole collection. Other fields stay.

    Returns:
      False if the collection already has exactly these predictions, else True.

    Raises:
      UserError: the collection already has other nts_<number>, or it lacks a synapse of
        the predictions. Nothing has been written then.
    """
    ids, known = feather.count()
    what = f"{name}.nts_{number}"
    plan = feather.plan() | {"rows": {name: len(ids)}}
    state = databases.state_of(database, what, plan)
    if state not in (databases.DROPPING, databases.FILLING):
        _drop_half(database, name)
    there = database[name].count_documents({f"nts_{number}": {"$exists": True}})
    if state == databases.DONE and there == known and not overwrite:
        return False
    filling = state in (databases.DROPPING, databases.FILLING)
    if filling or database[name].find_one({}, {"id": True}) is None:
        found = _brain_documents(feather, number)
        content = databases.Content(found, len(ids), "id", {"id": ("id",)})
        return databases.publish(database, what, {name: content}, plan, overwrite)
    if state not in (databases.CLEARING, databases.ADDING):
        if there and not overwrite:
            raise UserError(
                f"{there:,} documents of {database.name}.{name} have nts_{number} "
                "already; give --overwrite to replace them, or give another --predict"
            )
        _require(database[name], ids)
        databases.record(database, what, plan, databases.CLEARING)
    _add(database, name, number, feather, plan)
    return True


def _drop_half(database: databases.Database, name: str) -> None:
    """Drops the collection if another import created it and did not finish."""
    states = {"$in": [databases.DROPPING, databases.FILLING]}
    for half in list(database[databases.IMPORTS].find({"state": states})):
        if list(half["rows"]) == [name]:
            database.drop_collection(name)
            database[databases.IMPORTS].delete_one({"_id": half["_id"]})


def _brain_documents(feather: Feather, number: int) -> Iterator[Document]:
    for line, probabilities in feather.rows():
        position = {
            pre: documents.whole_if_whole(line[axis]) for axis, pre in _PRE.items()
        }
        fields = _brain_fields(feather, number, line["status"], probabilities)
        yield {"id": line["synapse_id"], **position, **fields}


def _brain_fields(
    feather: Feather,
    number: int,
    status: str | None,
    probabilities: list[float] | None,
) -> Document:
    fields: Document = {}
    if probabilities is not None:
        named = zip(feather.classes, probabilities, strict=True)
        fields[f"nts_{number}"] = dict(named)
    if status is not None:
        fields[f"status_{number}"] = status
    return fields


def _require(collection: databases.Collection, ids: np.ndarray) -> None:
    """Raises `UserError` unless each id names exactly one document."""
    indexes = collection.index_information().values()
    if not any(index["key"][0][0] == "id" for index in indexes):
        collection.create_index([("id", 1)], name="id", sparse=True)
    missing = 0
    first: list[int] = []
    for start in range(0, len(ids), testset_predictions.BATCH_ROWS):
        wanted = ids[start : start + testset_predictions.BATCH_ROWS].tolist()
        cursor = collection.find({"id": {"$in": wanted}}, {"_id": False, "id": True})
        found = [document["id"] for document in cursor]
        synapses.check_unique([np.asarray(found, np.int64)], collection.full_name)
        lost = sorted(set(wanted).difference(found))
        missing += len(lost)
        first += lost[: 5 - len(first)]
    if missing:
        shown = ", ".join(map(str, first)) + (", …" if missing > len(first) else "")
        raise UserError(
            f"{missing:,} synapses of the predictions are not in "
            f"{collection.full_name} ({shown}); name the collection that has them"
        )


def _add(
    database: databases.Database,
    name: str,
    number: int,
    feather: Feather,
    plan: Document,
) -> None:
    """Removes the old nts_<number> and adds the new, or continues a stopped import."""
    collection, what = database[name], f"{name}.nts_{number}"
    if databases.recorded(database, what)["state"] == databases.CLEARING:
        fields = [f"nts_{number}", f"status_{number}"]
        old = {"$or": [{field: {"$exists": True}} for field in fields]}
        collection.update_many(old, {"$unset": dict.fromkeys(fields, "")})
        databases.record(database, what, plan, databases.ADDING, added=0)
    added = databases.recorded(database, what)["added"]
    progress = Progress(what, plan["rows"][name], "documents", done=added)
    rest = itertools.islice(feather.rows(), added, None)
    while several := list(itertools.islice(rest, testset_predictions.BATCH_ROWS)):
        databases.set_fields(
            collection,
            "id",
            {
                line["synapse_id"]: _brain_fields(
                    feather, number, line["status"], probabilities
                )
                for line, probabilities in several
            },
        )
        added += len(several)
        databases.record(database, what, plan, databases.ADDING, added=added)
        progress.add(len(several))
    databases.record(database, what, plan, databases.DONE)


def read_brain(
    database: databases.Database,
    name: str,
    number: int,
    given_classes: Sequence[str] | None,
    source: str,
) -> tuple[pa.Schema, Iterator[pa.RecordBatch], int]:
    """Returns the schema, the rows and the number of rows of a prediction table.

    The order of the classes is that of the import. If there is no record of the import,
    the order is that of `given_classes`, or else of the first document. A document
    without nts_<number> has NaN for every class. The layout holds no neurons, so the
    columns about neurons are null.

    Args:
      name: the collection.
      number: the number of the network.
      given_classes: the classes in the network's order, or None.
      source: where the predictions come from. The metadata of the schema keeps this.

    Raises:
      UserError: the import is unfinished, the collection or nts_<number> is missing,
        the classes differ, or a document is not usable. The message names it.
    """
    field, status = f"nts_{number}", f"status_{number}"
    record = testset_predictions.finished(database, name, f"{name}.{field}")
    classes = testset_predictions.classes_of(record, given_classes)
    if classes is None:
        first = database[name].find_one({field: {"$exists": True}}, {field: True})
        if first is None or not isinstance(first[field], dict):
            raise UserError(f"no document of {database.name}.{name} has {field}")
        classes = list(first[field])
    wanted = dict.fromkeys(("id", *_PRE.values(), field, status), True)

    def rows() -> Iterator[Document]:
        for document in database[name].find({}, wanted | {"_id": False}):
            try:
                line = _brain_row(document, field, classes)
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{database.name}.{name}, id {document.get('id')}: {error} is "
                    "missing or not usable"
                ) from None
            yield line | {"status": document.get(status)}

    facts = pa.schema([column.with_nullable(True) for column in synapses.SCHEMA])
    schema = testset_predictions.schema_of(facts, classes, record, source)
    total = database[name].count_documents({})
    return schema, documents.in_batches(rows(), schema), total


def _brain_row(document: Document, field: str, classes: Sequence[str]) -> Document:
    line: Document = {"synapse_id": documents.integer(document["id"])}
    for axis, pre in _PRE.items():
        position = documents.number(document[pre])
        line[axis] = math.nan if position is None else position
    found = document.get(field)
    if found is None:
        found = dict.fromkeys(classes, math.nan)
    if not isinstance(found, dict) or found.keys() != set(classes):
        raise TypeError(f"{field} {found!r}, not a number for each of {classes},")
    for name in classes:
        line[predictions.probability_column(name)] = documents.number(found[name])
    return line
