# SPDX-License-Identifier: Apache-2.0
"""The original system's MongoDB, both ways; the only importer of pymongo.

The layout is that of documents.py (funkelab/synister, synister_db.py). Beside it, the
collection `imports` remembers what each import was made from, so that a killed import
goes on where it stopped and nobody takes a half for a whole: {_id: what was imported,
sha256 of the source, rows: documents in each collection, state, …}. `_id` of a document
is its own id, so that the server itself refuses a second one. Collections are filled in
place: not every server that speaks MongoDB can rename one.
"""

import collections
import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import pyarrow as pa
import pymongo
from pymongo import errors
from pymongo.collection import Collection
from pymongo.database import Database

from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.tables import synapses
from synister_jax.tables.mongo import address, documents
from synister_jax.tables.mongo.documents import Document

IMPORTS = "imports"
# States of an import into new collections: old ones are dropped; new ones are filled.
DROPPING, FILLING = "dropping", "filling"
# And into one that stays: old fields are removed; new ones are added.
CLEARING, ADDING = "clearing", "adding"
DONE = "done"
GROUND_TRUTH = "ground_truth"
BATCH_DOCUMENTS = 5_000
# Nothing else of a synapse is read, whatever columns an ingest has added.
SYNAPSE_FIELDS = dict.fromkeys(
    ("synapse_id", "skeleton_id", "x", "y", "z", "splits", "brain_region"), True
) | {"_id": False}
_DUPLICATE_KEY = 11000
_UNAUTHORISED = (13, 18)
_TIMEOUT_MS = 5_000


@contextlib.contextmanager
def connect(target: str, credentials: str | None = None) -> Iterator[Database]:
    """The database that `address.resolve` finds, open and answering; then closed.

    Raises:
      UserError: what pymongo raises, here or in the body, as one line that names host
        and database and never user or password.
    """
    uri = address.resolve(target, credentials)
    where = address.redact(uri)
    client = _client(uri)
    name = address.database_name(uri)
    hosts = where.split("://")[1].rsplit("/", 1)[0]
    with client:
        try:
            client.admin.command("ping")
        except errors.ConnectionFailure:
            seconds = client.options.server_selection_timeout
            raise UserError(
                f"database {name}: cannot reach MongoDB at {hosts} within "
                f"{seconds:g} s; is it running?"
            ) from None
        except errors.PyMongoError as error:
            raise _explained(error, where) from None
        try:
            yield client[name]
        except errors.PyMongoError as error:
            raise _explained(error, where) from None


def _client(uri: str) -> pymongo.MongoClient:
    timeouts = ("serverSelectionTimeoutMS", "connectTimeoutMS")
    given = address.options(uri)
    ours: dict[str, Any] = {
        name: _TIMEOUT_MS for name in timeouts if name.lower() not in given
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # options that it leaves out
            return pymongo.MongoClient(uri, connect=False, **ours)
    except (
        errors.PyMongoError,
        UserWarning,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        why = str(error)
        if any(secret in why for secret in address.secrets(uri)):
            why = type(error).__name__
        raise UserError(
            f"{address.redact(uri)} with its options is not usable: {why}"
        ) from None


def _explained(error: errors.PyMongoError, where: str) -> UserError:
    if isinstance(error, errors.OperationFailure) and error.code in _UNAUTHORISED:
        return UserError(
            f"{where}: not authorised (the server's code {error.code}); check user, "
            "password and the roles of the user"
        )
    if isinstance(error, errors.ConnectionFailure | errors.CursorNotFound):
        return UserError(
            f"{where}: the connection was lost half-way ({type(error).__name__}); "
            "run the same command again"
        )
    details = error.details or {} if isinstance(error, errors.OperationFailure) else {}
    failed = details.get("writeErrors") or [{}]
    why = failed[0].get("errmsg") or str(error).partition(", full error")[0]
    return UserError(f"{where}: {why}")


@dataclasses.dataclass(frozen=True)
class Content:
    """What a collection is filled with: `count` documents, always in one order."""

    documents: Iterable[Document]
    count: int
    id_field: str
    indexes: Mapping[str, Sequence[str]]


def write(
    database: Database,
    collections: Mapping[str, Iterable[Document]],
    table: pa.Table,
    sha256: str,
    overwrite: bool = False,
) -> bool:
    """Writes the ground truth; see `publish` for what happens to what is there.

    Args:
      collections: the documents of each of `documents.COLLECTIONS`; a list each, but
        for `synapses`, one for each row of `table`, in its order.
      sha256: of whatever the documents are made from.
    """
    contents = {}
    for name in documents.COLLECTIONS:
        found = collections[name]
        if name == "synapses":
            count = len(table)
        else:
            assert isinstance(found, Sized)  # as all others are
            count = len(found)
        contents[name] = Content(
            found, count, documents.ID_FIELDS[name], documents.INDEXES[name]
        )
    # Their order, and names that no synapse has, are nowhere else.
    splits = [n.removeprefix("split_") for n in synapses.split_columns(table)]
    plan = {"sha256": sha256, "splits": splits}
    return publish(database, GROUND_TRUTH, contents, plan, overwrite)


def publish(
    database: Database,
    what: str,
    contents: Mapping[str, Content],
    plan: Document,
    overwrite: bool,
) -> bool:
    """Fills the collections; False when exactly this is there already.

    Killed at any moment and run again, it leaves the same documents in the same order.
    With `overwrite`, what is there is dropped first.

    Raises:
      UserError: a collection is not empty, or its documents have an id twice.
    """
    plan = {**plan, "rows": {name: content.count for name, content in contents.items()}}
    state = state_of(database, what, plan)
    there = {name: database[name].count_documents({}) for name in contents}
    if state == DONE and there == plan["rows"] and not overwrite:
        return False
    if state != FILLING:
        filled = [f"{name} ({n:,} documents)" for name, n in there.items() if n]
        # What an import left unfinished, of this or another source, is nobody's.
        unfinished = recorded(database, what).get("state") in (DROPPING, FILLING)
        if filled and not overwrite and not unfinished:
            raise UserError(
                f"database {database.name} holds {', '.join(filled)} and nothing says "
                "that they are this; give --overwrite to replace them, or another name"
            )
        record(database, what, plan, DROPPING)
        for name in contents:
            database.drop_collection(name)
        record(database, what, plan, FILLING)
    for name, content in contents.items():
        _fill(database, name, content)
    record(database, what, plan, DONE)
    return True


def state_of(database: Database, what: str, plan: Document) -> str | None:
    """State of the import `what`; None if it was none of this `plan`."""
    found = recorded(database, what)
    same = all(found.get(key) == value for key, value in plan.items())
    return found.get("state") if same else None


def recorded(database: Database, what: str) -> Document:
    return database[IMPORTS].find_one({"_id": what}) or {}


def record(
    database: Database, what: str, plan: Document, state: str, **more: Any
) -> None:
    content = {"_id": what, **plan, "state": state, **more}
    database[IMPORTS].replace_one({"_id": what}, content, upsert=True)


def _fill(database: Database, name: str, content: Content) -> None:
    """Adds what the collection lacks: it holds the first so many of the documents."""
    collection = database[name]
    if name not in database.list_collection_names():
        database.create_collection(name)  # no documents are a collection as well
    there = collection.count_documents({})
    progress = Progress(name, content.count, "documents", done=there)
    rest = iter(content.documents)
    skipped = collections.deque(itertools.islice(rest, there), maxlen=1)
    # Only the documents of this import, or this would go on in something else.
    ours = all(collection.find_one({"_id": d[content.id_field]}) for d in skipped)
    while ours and (batch := list(itertools.islice(rest, BATCH_DOCUMENTS))):
        _insert(collection, batch, there, content.id_field)
        there += len(batch)
        progress.add(len(batch))
    if not ours or collection.count_documents({}) != content.count:
        database.drop_collection(name)
        raise UserError(
            f"{database.name}.{name} does not hold the documents of this import; does "
            "something else write to it? It is dropped: run the command again"
        )
    for index, fields in content.indexes.items():
        collection.create_index(
            [(field, 1) for field in fields], name=index, sparse=True
        )


def _insert(
    collection: Collection, batch: list[Document], start: int, id_field: str
) -> None:
    """Inserts documents `start`, `start` + 1, … of an import, in order."""
    while batch:
        try:
            collection.insert_many([{**d, "_id": d[id_field]} for d in batch])
            return
        except errors.BulkWriteError as error:
            failure = error.details["writeErrors"][0]
            if failure["code"] != _DUPLICATE_KEY:
                raise
            # The last batch of a client that was killed may still have been on its way:
            # the same documents in the same order, so the count says how far they are.
            there = collection.count_documents({})
            if there <= start + failure["index"]:
                key = batch[failure["index"]][id_field]
                raise UserError(
                    f"{collection.name}: {id_field} {key} is "
                    "there twice; an id names one document"
                ) from None
            batch, start = batch[there - start :], there


def set_fields(
    collection: Collection, id_field: str, fields: Mapping[int, Document]
) -> None:
    """Sets fields of documents by id; run again, it changes nothing.

    Raises:
      UserError: a document is not there.
    """
    updates = [
        pymongo.UpdateOne({id_field: key}, {"$set": values})
        for key, values in fields.items()
        if values
    ]
    if updates and collection.bulk_write(updates).matched_count != len(updates):
        raise UserError(
            f"documents of {collection.full_name} went away meanwhile; stop whatever "
            "writes and rerun"
        )


def read_table(uri: str) -> pa.Table:
    """All synapses of the database, a row each, not yet checked (synapses.conform).

    Raises:
      UserError: see `connect` and `read_batches`.
    """
    with connect(uri) as database:
        schema, batches = read_batches(database)
        return pa.Table.from_batches(batches, schema)


def read_batches(database: Database) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The synapse table's schema and its rows, in the order of their import.

    Neurons and hemilineages are held in memory, synapses 10,000 at a time. Fields that
    old databases lack may be absent: splits, brain_region, type, prepost, meta_id.

    Raises:
      UserError: names collection, document and field where one is absent or not usable.
    """
    skeletons, hemi_lineages = read_neurons(database)
    schema = synapse_schema(database)

    def batches() -> Iterator[pa.RecordBatch]:
        found = database.synapses.find({}, SYNAPSE_FIELDS)
        try:
            yield from documents.to_batches(found, skeletons, hemi_lineages, schema)
        except UserError as error:
            raise UserError(f"{database.name}.synapses: {error}") from None

    return schema, batches()


def read_neurons(
    database: Database,
) -> tuple[dict[int, Document], dict[int, Document]]:
    """`skeletons` and `hemi_lineages` by id."""
    state = recorded(database, GROUND_TRUTH).get("state", DONE)
    if state != DONE:
        raise UserError(
            f"an import into database {database.name} is unfinished; run that again"
        )
    there = database.list_collection_names()
    if lacking := [name for name in documents.COLLECTIONS if name not in there]:
        raise UserError(
            f"database {database.name} has no collection {', '.join(lacking)}"
        )
    if not recorded(database, GROUND_TRUTH) and database.synapses.find_one() is None:
        raise UserError(f"database {database.name} has no synapses")
    return _by_id(database.skeletons), _by_id(database.hemi_lineages)


def _by_id(collection: Collection) -> dict[int, Document]:
    field = documents.ID_FIELDS[collection.name]
    found: dict[int, Document] = {}
    for document in collection.find({}, {"_id": False}):
        try:
            key = documents.integer(document[field])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{collection.full_name}: {field}: {error} is missing or not usable in "
                f"{document}"
            ) from None
        if found.setdefault(key, document) != document:
            raise UserError(f"{collection.full_name}: two documents have {field} {key}")
    return found


def synapse_schema(database: Database) -> pa.Schema:
    """The synapse table's columns with all splits, any of them null."""
    names = dict.fromkeys(recorded(database, GROUND_TRUTH).get("splits", []))
    seen: set[str] = set()
    for synapse in database.synapses.find({}, {"_id": False, "splits": True}):
        if isinstance(synapse.get("splits"), dict):
            seen.update(synapse["splits"])
    names |= dict.fromkeys(sorted(seen))
    fields = [field.with_nullable(True) for field in synapses.SCHEMA]
    return pa.schema(fields + [(f"split_{name}", pa.string()) for name in names])
