# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the MongoDB of the original system.

Only this module imports pymongo. documents.py describes the layout of the documents
(funkelab/synister, synister_db.py).

The additional collection `imports` records what each import was made from: {_id: what
was imported, sha256: of the source, rows: documents in each collection, state, …}. So a
killed import can continue, and no program uses an incomplete import. The `_id` of a
document is its own id, so the server refuses a second document with the same id.
Collections are filled in place, because not every server that understands MongoDB's
protocol can rename a collection.
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
# An import into new collections first drops the old ones, then fills the new ones.
DROPPING, FILLING = "dropping", "filling"
# An import into an existing collection first removes old fields, then adds new fields.
CLEARING, ADDING = "clearing", "adding"
DONE = "done"
GROUND_TRUTH = "ground_truth"
BATCH_DOCUMENTS = 5_000
# Only these fields of a synapse are read, even if an import has added other fields.
SYNAPSE_FIELDS = dict.fromkeys(
    ("synapse_id", "skeleton_id", "x", "y", "z", "splits", "brain_region"), True
) | {"_id": False}
_DUPLICATE_KEY = 11000
_UNAUTHORISED = (13, 18)
_TIMEOUT_MS = 5_000


@contextlib.contextmanager
def connect(target: str, credentials: str | None = None) -> Iterator[Database]:
    """Opens the database that `address.resolve` finds, and closes it at the end.

    Args:
      target: the URI or the name of the database.
      credentials: the ini file, if `target` is a name.

    Raises:
      UserError: the address is not usable, or pymongo raises an error here or in the
        body of the `with` statement. The message is one line that names host and
        database, and never the user or the password.
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
            warnings.simplefilter(
                "error", UserWarning
            )  # pymongo warns of unknown options
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
            f"{where}: not authorised (the server's code {error.code}); check the "
            "user, the password and the roles of the user"
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
    """The documents that fill a collection, always in the same order."""

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
    """Writes the ground truth into the three collections, as `publish` does.

    Args:
      collections: the documents of each of `documents.COLLECTIONS`. `synapses` yields a
        document for each row of `table`, in the same order. The others are lists.
      table: the synapse table.
      sha256: the SHA-256 of the source of the documents.
      overwrite: replace documents that the collections already have.

    Returns:
      False if the database already holds exactly these documents, else True.

    Raises:
      UserError: a collection is not empty, or two documents have the same id.
    """
    contents = {}
    for name in documents.COLLECTIONS:
        found = collections[name]
        if name == "synapses":
            count = len(table)
        else:
            assert isinstance(found, Sized)  # the other collections are lists
            count = len(found)
        contents[name] = Content(
            found, count, documents.ID_FIELDS[name], documents.INDEXES[name]
        )
    # Only this record keeps the order of the splits, and splits that no synapse has.
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
    """Fills collections with documents.

    The import can be killed at any moment. If it then runs again, the collections have
    the same documents in the same order.

    Args:
      what: the name of the import in the collection `imports`.
      contents: what each collection is filled with.
      plan: what the documents are made from. Another plan is another import.
      overwrite: drop the collections first if they have documents.

    Returns:
      False if the database already holds exactly this import, else True.

    Raises:
      UserError: a collection is not empty, or two documents have the same id.
    """
    plan = {**plan, "rows": {name: content.count for name, content in contents.items()}}
    state = state_of(database, what, plan)
    there = {name: database[name].count_documents({}) for name in contents}
    if state == DONE and there == plan["rows"] and not overwrite:
        return False
    if state != FILLING:
        filled = [f"{name} ({n:,} documents)" for name, n in there.items() if n]
        # Documents of an unfinished import may be dropped, whatever its source was.
        unfinished = recorded(database, what).get("state") in (DROPPING, FILLING)
        if filled and not overwrite and not unfinished:
            raise UserError(
                f"database {database.name} holds {', '.join(filled)}, but has no "
                "record that this import wrote them; give --overwrite to replace them, "
                "or choose another name"
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
    """Returns the state of the import `what`, or None if its plan was another one."""
    found = recorded(database, what)
    same = all(found.get(key) == value for key, value in plan.items())
    return found.get("state") if same else None


def recorded(database: Database, what: str) -> Document:
    """Returns the record of the import `what`, or an empty document."""
    return database[IMPORTS].find_one({"_id": what}) or {}


def record(
    database: Database, what: str, plan: Document, state: str, **more: Any
) -> None:
    """Writes the record of the import `what`."""
    content = {"_id": what, **plan, "state": state, **more}
    database[IMPORTS].replace_one({"_id": what}, content, upsert=True)


def _fill(database: Database, name: str, content: Content) -> None:
    """Adds the missing documents. The collection must hold the first ones, in order."""
    collection = database[name]
    if name not in database.list_collection_names():
        database.create_collection(name)  # it must exist without documents, too
    there = collection.count_documents({})
    progress = Progress(name, content.count, "documents", done=there)
    rest = iter(content.documents)
    skipped = collections.deque(itertools.islice(rest, there), maxlen=1)
    # The import continues only if the last document in the collection is its own.
    ours = all(collection.find_one({"_id": d[content.id_field]}) for d in skipped)
    while ours and (batch := list(itertools.islice(rest, BATCH_DOCUMENTS))):
        _insert(collection, batch, there, content.id_field)
        there += len(batch)
        progress.add(len(batch))
    if not ours or collection.count_documents({}) != content.count:
        database.drop_collection(name)
        raise UserError(
            f"{database.name}.{name} held other documents than those of this import, "
            "so the import has dropped the collection; make sure that no other program "
            "writes to it and run again"
        )
    for index, fields in content.indexes.items():
        collection.create_index(
            [(field, 1) for field in fields], name=index, sparse=True
        )


def _insert(
    collection: Collection, batch: list[Document], start: int, id_field: str
) -> None:
    """Inserts the documents `start`, `start` + 1, … of an import in this order."""
    while batch:
        try:
            collection.insert_many([{**d, "_id": d[id_field]} for d in batch])
            return
        except errors.BulkWriteError as error:
            failure = error.details["writeErrors"][0]
            if failure["code"] != _DUPLICATE_KEY:
                raise
            # A killed client may have sent its last batch just before. That batch has
            # the same documents in the same order, so the count says how many arrived.
            there = collection.count_documents({})
            if there <= start + failure["index"]:
                key = batch[failure["index"]][id_field]
                raise UserError(
                    f"{collection.name}: {id_field} {key} is "
                    "there twice; give every document its own id"
                ) from None
            batch, start = batch[there - start :], there


def set_fields(
    collection: Collection, id_field: str, fields: Mapping[int, Document]
) -> None:
    """Sets fields of documents. A second call with the same values changes nothing.

    Args:
      id_field: the field with the id of a document.
      fields: the new fields of each document, by its id.

    Raises:
      UserError: the collection does not have one of the documents.
    """
    updates = [
        pymongo.UpdateOne({id_field: key}, {"$set": values})
        for key, values in fields.items()
        if values
    ]
    if updates and collection.bulk_write(updates).matched_count != len(updates):
        raise UserError(
            f"documents of {collection.full_name} were removed during the import; stop "
            "the program that removes them and run again"
        )


def read_table(uri: str) -> pa.Table:
    """Reads all synapses of a database. `synapses.conform` must still check them.

    Raises:
      UserError: `connect` or `read_batches` raises it.
    """
    with connect(uri) as database:
        schema, batches = read_batches(database)
        return pa.Table.from_batches(batches, schema)


def read_batches(database: Database) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Returns the schema of the synapse table, and its rows in the order of the import.

    All neurons and hemilineages are in memory, but only 10,000 synapses at a time. The
    fields splits, brain_region, type, prepost and meta_id may be absent, because old
    databases lack them.

    Raises:
      UserError: a collection, a document or a field is missing or not usable. The
        message names it.
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
    """Returns the documents of `skeletons` and of `hemi_lineages` by their ids.

    Raises:
      UserError: an import is unfinished, a collection is missing, the database has no
        synapses, or a document is not usable.
    """
    state = recorded(database, GROUND_TRUTH).get("state", DONE)
    if state != DONE:
        raise UserError(
            f"an import into database {database.name} is unfinished; run that "
            "import again"
        )
    there = database.list_collection_names()
    if lacking := [name for name in documents.COLLECTIONS if name not in there]:
        raise UserError(
            f"database {database.name} has no collection {', '.join(lacking)}"
        )
    if not recorded(database, GROUND_TRUTH) and database.synapses.find_one() is None:
        raise UserError(f"database {database.name} has no synapses; import them first")
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
    """Returns the nullable columns of the synapse table, with those of all splits."""
    names = dict.fromkeys(recorded(database, GROUND_TRUTH).get("splits", []))
    seen: set[str] = set()
    for synapse in database.synapses.find({}, {"_id": False, "splits": True}):
        if isinstance(synapse.get("splits"), dict):
            seen.update(synapse["splits"])
    names |= dict.fromkeys(sorted(seen))
    fields = [field.with_nullable(True) for field in synapses.SCHEMA]
    return pa.schema(fields + [(f"split_{name}", pa.string()) for name in names])
