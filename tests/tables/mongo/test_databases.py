# SPDX-License-Identifier: Apache-2.0
"""Ground truth and predictions through a server, over TCP."""

import itertools
import json
import pathlib
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pymongo
import pytest
from pyarrow import feather
from pymongo import errors, uri_parser
from pymongo.collection import Collection
from pymongo.database import Database

from synister_jax.base.errors import UserError
from synister_jax.tables import predictions, reading, synapses
from synister_jax.tables.mongo import (
    address,
    brain_predictions,
    databases,
    documents,
    json_export,
    testset_predictions,
)
from tests.helpers import mongo_server
from tests.helpers.mongo_server import load_table

CLASSES = ("dopamine", "gaba", "acetylcholine")
BIG = 2**60 + 1  # no double holds it


def write_export(folder: pathlib.Path) -> None:
    export = {
        "hemi_lineages_v3": {
            "1": {"nt_guess": ["gaba"], "hemi_lineage_name": "ALad1"},
            "7": {"nt_guess": None, "hemi_lineage_name": "NONE"},
        },
        "skeletons_v3": {
            str(BIG): {"hemi_lineage_id": 1, "nt_known": ["gaba", "octopamine"]},
            "27": {"hemi_lineage_id": 7, "nt_known": None},
        },
        "synapses_v3": {
            str(BIG + 2): {"skeleton_id": BIG, "x": 400, "y": 80, "z": 40}
            | {"brain_region": "AL", "splits": {"skeleton": "train", "known": "test"}},
            "3": {"skeleton_id": 27, "x": 1, "y": 2.5, "z": 3}
            | {"brain_region": None, "splits": None},
        },
    }
    for name, content in export.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


# As the original's import writes them, and `_id`.
IMPORTED = {
    "hemi_lineages": [
        {"hemi_lineage_id": 1, "hemi_lineage_name": "ALad1", "nt_guess": ["gaba"]},
        {"hemi_lineage_id": 7, "hemi_lineage_name": "NONE", "nt_guess": None},
    ],
    "skeletons": [
        {
            "skeleton_id": BIG,
            "hemi_lineage_id": 1,
            "nt_known": ["gaba", "octopamine"],
        },
        {"skeleton_id": 27, "hemi_lineage_id": 7, "nt_known": None},
    ],
    "synapses": [
        {
            "synapse_id": BIG + 2,
            "x": 400,
            "y": 80,
            "z": 40,
            "skeleton_id": BIG,
            "splits": {"skeleton": "train", "known": "test"},
            "prepost": None,
            "meta_id": None,
            "brain_region": "AL",
        },
        {
            "synapse_id": 3,
            "x": 1,
            "y": 2.5,
            "z": 3,
            "skeleton_id": 27,
            "splits": None,
            "prepost": None,
            "meta_id": None,
            "brain_region": None,
        },
    ],
}


def typed(value: Any) -> Any:
    """Equal only where the types are equal as well: 1 is not 1.0."""
    if isinstance(value, dict):
        return {key: typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [typed(each) for each in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return (int, int(value))  # bson tells wide integers by a type of their own
    return (type(value), value)


def contents(uri: str) -> dict[str, list]:
    """All documents of all collections, in natural order."""
    with databases.connect(uri) as database:
        names = sorted(database.list_collection_names())
        return {name: typed(list(database[name].find())) for name in names}


def is_real(database: Database) -> bool:
    """Whether it is MongoDB's own server, which keeps the names of indexes."""
    return "version" in database.client.server_info()


def test_no_jax_and_pymongo_in_one_module() -> None:
    modules = "databases, testset_predictions, brain_predictions"
    code = (
        f"from synister_jax.tables.mongo import {modules}; import sys; "
        "print('jax' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
    package = pathlib.Path(databases.__file__).parents[2]
    importers = {
        path.name
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) (pymongo|bson)", path.read_text(), re.M)
    }
    assert importers == {"databases.py"}


def test_export_v3_as_the_original_imports_it(
    tmp_path: pathlib.Path, mongo_database: str
) -> None:
    write_export(tmp_path)
    table = reading.load(tmp_path)
    with databases.connect(mongo_database) as database:
        assert databases.write(
            database, json_export.collections(tmp_path), table, "sha"
        )
        real = is_real(database)
        for name, indexes in documents.INDEXES.items():
            found = database[name].index_information()
            keys = {i: tuple(k for k, _ in about["key"]) for i, about in found.items()}
            assert set(indexes.values()) <= set(keys.values())
            assert not real or indexes.items() <= keys.items()
    found = contents(mongo_database)
    assert sorted(found) == ["hemi_lineages", "imports", "skeletons", "synapses"]
    for name, expected in IMPORTED.items():
        id_field = documents.ID_FIELDS[name]
        expected = [{**each, "_id": each[id_field]} for each in expected]
        assert found[name] == typed(expected)
    loaded = reading.load(mongo_database)
    assert loaded.equals(table) and loaded.schema.equals(table.schema)
    source = json.loads(loaded.schema.metadata[b"synister_jax"])["source"]
    assert source == address.redact(mongo_database)


def random_table(seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 400))
    neurons = rng.integers(0, 2**62, max(1, count // 7))
    neuron = rng.integers(0, len(neurons), count)

    def of_neurons(values: list[str | None]) -> pa.Array:
        chosen = rng.integers(0, len(values), len(neurons))
        return pa.array([values[chosen[n]] for n in neuron], pa.string())

    def of_rows(values: list[str | None]) -> pa.Array:
        return pa.array([values[i] for i in rng.integers(0, len(values), count)])

    names = ["b", "a", "of a neuron"][: int(rng.integers(0, 4))]
    columns = {
        "synapse_id": rng.choice(2**62, count, replace=False),
        "z_nm": rng.integers(-(10**6), 10**6, count) * 40.0,
        "y_nm": rng.random(count) * 10.0 ** rng.integers(-8, 8, count),
        "x_nm": np.floor(rng.random(count) * 1e7) / 2,
        "neuron_id": neurons[neuron],
        "neurotransmitter": of_neurons([None, "gaba", "gaba+octopamine", "neither"]),
        "hemilineage": of_neurons([None, "ALad1", "é/x.y"]),
        "cell_type": of_neurons([None, "KC", "$x"]),
        "brain_region": of_rows([None, "AL", "MB(+ACA)"]),
        **{f"split_{n}": of_rows([None, *synapses.PARTS]) for n in names},
        "split_of_none": pa.nulls(count, pa.string()),
    }
    return synapses.conform(pa.table(columns), "random")


@pytest.mark.parametrize("seed", range(6))
def test_a_table_comes_back(mongo_database: str, seed: int) -> None:
    table = random_table(seed)
    load_table(mongo_database, table)
    loaded = reading.load(mongo_database)
    assert loaded.schema.equals(table.schema)
    assert loaded.equals(table)


def test_a_table_of_ids_and_positions_comes_back(mongo_database: str) -> None:
    columns = dict.fromkeys(synapses.POSITION, [1.0, 2.0])
    table = synapses.conform(pa.table({"synapse_id": [2, 1], **columns}), "here")
    load_table(mongo_database, table)
    assert reading.load(mongo_database).equals(table)
    nothing = table.slice(0, 0)
    load_table(mongo_database, nothing, overwrite=True)
    assert reading.load(mongo_database).equals(nothing)


def test_what_is_there_stays_unless_told(mongo_database: str) -> None:
    first, second = random_table(1), random_table(2)
    assert load_table(mongo_database, first)
    before = contents(mongo_database)
    assert not load_table(mongo_database, first)
    with pytest.raises(UserError, match=r"holds hemi_lineages \(.*give --overwrite"):
        load_table(mongo_database, second)
    assert contents(mongo_database) == before
    assert load_table(mongo_database, second, overwrite=True)
    assert reading.load(mongo_database).equals(second)
    assert load_table(mongo_database, first, overwrite=True)
    assert contents(mongo_database) == before
    with databases.connect(mongo_database) as database:
        database.synapses.delete_one({"synapse_id": first["synapse_id"][3].as_py()})
    with pytest.raises(UserError, match="nothing says that they are this"):
        load_table(mongo_database, first)


class Interrupted(BaseException):
    """What kill -9 is to a process, between two of its calls of the server."""


WRITES = [
    *((Collection, name) for name in ("create_index", "replace_one")),
    *((Collection, name) for name in ("insert_many", "bulk_write", "update_many")),
    *((Database, name) for name in ("create_collection", "drop_collection")),
]


def interrupt(patch: pytest.MonkeyPatch, at: int) -> None:
    """Stops at point `at`: before and after each write, and half-way of lists."""
    points = itertools.count()

    def reached() -> bool:
        return next(points) == at

    def stopping(write: Callable[..., Any]) -> Callable[..., Any]:
        def stopping_write(self: Any, what: Any, *more: Any, **options: Any) -> Any:
            if reached():
                raise Interrupted
            if write.__name__ in ("insert_many", "bulk_write") and reached():
                if len(what) > 1:
                    write(self, what[: len(what) // 2], *more, **options)
                raise Interrupted
            result = write(self, what, *more, **options)
            if reached():
                raise Interrupted
            return result

        return stopping_write

    for owner, name in WRITES:
        patch.setattr(owner, name, stopping(getattr(owner, name)))


def interrupted_anywhere(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[], Any], run: Callable[[], Any]
) -> Iterable[int]:
    """Runs `start`, then `run` stopped at its first, second, … point; yields each."""
    monkeypatch.setattr(databases, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(testset_predictions, "BATCH_ROWS", 4)
    for at in itertools.count():
        start()
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            try:
                run()
            except Interrupted:
                pass
            else:
                return
        yield at


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_import_interrupted_anywhere(
    mongo_database: str, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    table, other = random_table(3).slice(0, 9), random_table(4).slice(0, 7)
    load_table(mongo_database, table)
    undisturbed = contents(mongo_database)

    def start() -> None:
        drop(mongo_database)
        if overwrite:
            load_table(mongo_database, other)

    def run() -> bool:
        return load_table(mongo_database, table, overwrite)

    points = 0
    for points in interrupted_anywhere(monkeypatch, start, run):
        if overwrite and points % 3 == 0:
            # The other one can be had back whatever state this is in.
            load_table(mongo_database, other, overwrite=True)
            assert reading.load(mongo_database).equals(other)
        run()
        assert contents(mongo_database) == undisturbed, points
    assert points > 30


def drop(uri: str) -> None:
    with databases.connect(uri) as database:
        for name in (database.name, f"{database.name}_predictions"):
            database.client.drop_database(name)


def test_another_source_starts_anew(
    mongo_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = random_table(3), random_table(4)
    with monkeypatch.context() as patch:
        interrupt(patch, 12)
        patch.setattr(databases, "BATCH_DOCUMENTS", 10)
        with pytest.raises(Interrupted):
            load_table(mongo_database, first)
    with pytest.raises(UserError, match="an import into .* is unfinished"):
        reading.load(mongo_database)
    load_table(mongo_database, second)
    assert reading.load(mongo_database).equals(second)


def test_reading_what_is_half_replaced_is_refused(
    mongo_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_table(mongo_database, random_table(3))
    with monkeypatch.context() as patch:
        patch.setattr(Collection, "insert_many", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_table(mongo_database, random_table(4), overwrite=True)
    with pytest.raises(UserError, match="import .* is unfinished; run that again"):
        reading.load(mongo_database)


def test_documents_of_a_killed_client_that_arrive_late(
    mongo_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = random_table(5)
    insert_many = Collection.insert_many
    late = [3, 0, 2]

    def beaten(self: Collection, batch: list[dict]) -> Any:
        if self.name.startswith("synapses") and late:
            if count := late.pop():
                insert_many(self, batch[:count])
        return insert_many(self, batch)

    monkeypatch.setattr(Collection, "insert_many", beaten)
    monkeypatch.setattr(databases, "BATCH_DOCUMENTS", 20)
    load_table(mongo_database, table)
    assert not late
    assert reading.load(mongo_database).equals(table)


def test_something_else_in_a_half_filled_collection(
    mongo_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = random_table(3)
    for foreign in (3, len(table) + 1):
        with monkeypatch.context() as patch:
            interrupt(patch, 12)
            with pytest.raises(Interrupted):
                load_table(mongo_database, table)
        with databases.connect(mongo_database) as database:
            strange = [{"_id": -5 - i, "synapse_id": -5 - i} for i in range(foreign)]
            database.synapses.drop()
            database.synapses.insert_many(strange)
        with pytest.raises(UserError, match="not hold the documents of this import"):
            load_table(mongo_database, table)
        load_table(mongo_database, table)
        assert reading.load(mongo_database).equals(table)
        drop(mongo_database)


def test_an_id_twice_in_the_source(mongo_database: str) -> None:
    table = random_table(1)
    found = documents.from_table(table)
    found["skeletons"].append(found["skeletons"][0])
    with databases.connect(mongo_database) as database:
        with pytest.raises(
            UserError, match=r"skeletons: skeleton_id \d+ is there twice"
        ):
            databases.write(database, found, table, "sha")


@pytest.mark.parametrize(
    ("collection", "change", "message"),
    [
        ("synapses", {"$unset": {"z": ""}}, r"\.synapses: synapse 1: 'z' is missing"),
        ("synapses", {"$unset": {"synapse_id": ""}}, r"\.synapses: .*'synapse_id' is"),
        ("synapses", {"$unset": {"skeleton_id": ""}}, "'skeleton_id' is missing"),
        (
            "synapses",
            {"$set": {"synapse_id": 1.5}},
            r"synapse 1\.5: id 1\.5, not an in",
        ),
        (
            "synapses",
            {"$set": {"skeleton_id": 4}},
            "synapse 1: 'skeleton 4' is missing",
        ),
        ("synapses", {"$set": {"x": "1"}}, "synapse 1: coordinate '1'"),
        ("skeletons", {"$unset": {"skeleton_id": ""}}, r"\.skeletons: .*'skeleton_id'"),
        (
            "skeletons",
            {"$set": {"skeleton_id": 5.5}},
            r"\.skeletons: .*id 5\.5, not an",
        ),
        ("skeletons", {"$set": {"hemi_lineage_id": 8}}, "'hemi_lineage 8' is missing"),
        (
            "skeletons",
            {"$set": {"nt_known": "gaba"}},
            "'gaba' of skeleton 2, not a list",
        ),
        (
            "hemi_lineages",
            {"$set": {"hemi_lineage_id": "1"}},
            r"\.hemi_lineages: .*'1'",
        ),
    ],
)
def test_unusable_documents_are_named(
    mongo_database: str, collection: str, change: dict, message: str
) -> None:
    with databases.connect(mongo_database) as database:
        # An old database: no splits, no brain_region, no type, ids of its own.
        database.hemi_lineages.insert_one(
            {"hemi_lineage_id": 1, "hemi_lineage_name": "A"}
        )
        database.skeletons.insert_one({"skeleton_id": 2, "hemi_lineage_id": 1})
        database.synapses.insert_one(
            {"synapse_id": 1, "skeleton_id": 2, "x": 1, "y": 2, "z": 3, "source": "abc"}
        )
        [row] = reading.load(mongo_database).to_pylist()
        assert (row["hemilineage"], row["neuron_id"], row["x_nm"]) == ("A", 2, 1.0)
        database[collection].update_one({}, change)
    with pytest.raises(UserError, match=message):
        reading.load(mongo_database)


def test_two_documents_of_one_neuron(mongo_database: str) -> None:
    load_table(mongo_database, random_table(1))
    with databases.connect(mongo_database) as database:
        neuron = database.skeletons.find_one({}, {"_id": False})
        database.skeletons.insert_one(dict(neuron))  # says the same: no harm
        reading.load(mongo_database)
        database.skeletons.insert_one(neuron | {"nt_known": ["serotonin"]})
    with pytest.raises(UserError, match="two documents have skeleton_id"):
        reading.load(mongo_database)


def test_missing_collections(mongo_database: str) -> None:
    every = "hemi_lineages, skeletons, synapses"
    with pytest.raises(UserError, match=f"synister_test_.* has no collection {every}$"):
        reading.load(mongo_database)
    with databases.connect(mongo_database) as database:
        database.synapses.insert_one({"synapse_id": 1})
        database.hemi_lineages.insert_one({"hemi_lineage_id": 1})
    with pytest.raises(UserError, match="has no collection skeletons$"):
        reading.load(mongo_database)


def test_a_split_named_while_reading(mongo_database: str) -> None:
    table = random_table(1)
    load_table(mongo_database, table)
    with databases.connect(mongo_database) as database:
        schema, batches = databases.read_batches(database)
        synapse = {"synapse_id": table["synapse_id"][3].as_py()}
        database.synapses.update_one(synapse, {"$set": {"splits": {"new": "test"}}})
        with pytest.raises(UserError, match="has split_new, which was not there when"):
            pa.Table.from_batches(batches, schema)


def test_a_server_that_stops_half_way(tmp_path: pathlib.Path) -> None:
    server, uri = mongo_server.start(tmp_path)
    try:
        load_table(f"{uri}/db", random_table(1))
        with pytest.raises(UserError, match="/db: the connection was lost half-way"):
            with databases.connect(f"{uri}/db") as database:
                _, batches = databases.read_batches(database)
                server.kill()
                server.wait()
                list(batches)
        with pytest.raises(UserError, match="db: cannot reach MongoDB at 127.0.0.1:"):
            reading.load(f"{uri}/db?serverSelectionTimeoutMS=300")
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.CursorNotFound("cursor id 5 not found"), "the connection was lost"),
        (errors.OperationFailure("Authentication failed.", 18), "not authorised"),
        (errors.OperationFailure("not authorized on db", 13), "not authorised"),
        (errors.OperationFailure("disk is full", 14031), "disk is full"),
    ],
)
def test_errors_of_the_server_are_one_line(
    mongo_database: str, error: Exception, message: str
) -> None:
    name = mongo_database.rpartition("/")[2]
    with pytest.raises(UserError, match=rf"mongodb://.*/{name}: .*{message}"):
        with databases.connect(mongo_database):
            raise error


PASSWORD = "p@ss:/w?rd%"


def test_credentials_of_the_original(tmp_path: pathlib.Path) -> None:
    ini = tmp_path / "db_credentials.ini"
    ini.write_text(
        f"[Credentials]\nuser = me@home\npassword = {PASSWORD}\n"
        "host = 127.0.0.1\nport = 9\n"
    )
    uri = address.resolve("synister_v3", str(ini))
    parsed = uri_parser.parse_uri(uri)
    assert parsed["username"] == "me@home" and parsed["password"] == PASSWORD
    assert parsed["nodelist"] == [("127.0.0.1", 9)]
    assert parsed["database"] == "synister_v3"
    assert parsed["options"]["authSource"] == "admin"
    assert address.redact(uri) == "mongodb://127.0.0.1:9/synister_v3"
    with pytest.raises(UserError) as refused:
        reading.load(f"{uri}&serverSelectionTimeoutMS=200")
    assert str(refused.value) == (
        "database synister_v3: cannot reach MongoDB at 127.0.0.1:9 within 0.2 s; "
        "is it running?"
    )
    ini.write_text("[Credentials]\nhost = db.org\n")
    assert address.resolve("d", str(ini)) == "mongodb://db.org:27017/d"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("password = secret", "MissingSectionHeaderError"),
        ("[Credentials]\nsecret\n", "ParsingError"),
        ("[Credentials]\nuser = secret\n", r"needs .* with host.*KeyError"),
        ("[Credentials]\nhost = h\nport = secret", "ValueError"),
        ("[Credentials]\nhost = h\nuser = secret", "only one of user and password"),
        ("[Credentials]\nhost = a secret", r"a MongoDB URI is mongodb://"),
    ],
)
def test_unusable_credentials(tmp_path: pathlib.Path, text: str, message: str) -> None:
    ini = tmp_path / "db_credentials.ini"
    ini.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        address.resolve("db", str(ini))
    assert "secret" not in str(refused.value)
    with pytest.raises(UserError, match="cannot read .*no.ini"):
        address.resolve("db", str(tmp_path / "no.ini"))


QUOTED = urllib.parse.quote_plus(PASSWORD)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mongodb://me:secret@h", "mongodb://h/ does not end with a database name"),
        ("mongodb://me:secret@h/", "does not end with a database name"),
        ("mongodb://me:secret@h/a.b", "does not end with a database name"),
        ("mongodb://me:secret@h/a%20b", "does not end with a database name"),
        ("mongodb://me:sec@ret@h/db", "a MongoDB URI is"),
        ("mongodb://me:sec/ret@h/db", "a MongoDB URI is"),
        ("mongodb://me:sec?ret@h/db", "a MongoDB URI is"),
        ("mongodb:/me:secret@h/db", "a MongoDB URI is"),
        ("mongo://me:secret@h/db", "neither mongodb://host/DB nor a database name"),
        ("me:secret@h", "neither mongodb://host/DB nor a database name"),
        ("mongodb://me:secret%@h/db", "mongodb://h/db with its options is not usable"),
        (
            "mongodb://h/db?tlsCertificateKeyFilePassword=secret&tls=so",
            "/db with its opt",
        ),
        ("mongodb://me:secret@h/db?tls=secret", "is not usable"),
        ("mongodb://me:secret@h/db?authSourc=here", "Unknown option: authsourc"),
        ("mongodb://me:secret@h:99999/db", "mongodb://h:99999/db .*Port must be"),
        (
            "mongodb+srv://me:secret@nowhere.invalid/db",
            r"mongodb\+srv://nowhere.invalid",
        ),
    ],
)
def test_a_malformed_uri_is_not_quoted(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        with databases.connect(uri):
            pass
    shown = str(refused.value) + address.redact(uri) * uri.startswith("mongodb")
    assert not re.search("secret|sec[@/?]|ret@", shown)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"mongodb://me:{QUOTED}@h:1,g:2/db?tls=true", "mongodb://h:1,g:2/db"),
        ("mongodb://[::1]:27017/db", "mongodb://[::1]:27017/db"),
        ("mongodb+srv://me:p@cluster.org/db", "mongodb+srv://cluster.org/db"),
        (f"mongodb://me:{PASSWORD}@h/db", "mongodb://…/"),
        ("data/mongodb.feather", "data/mongodb.feather"),
    ],
)
def test_redact(uri: str, shown: str) -> None:
    assert address.redact(uri) == shown
    assert address.redact(shown) == shown


def test_a_name_needs_credentials_and_a_uri_none() -> None:
    with pytest.raises(UserError, match="give --credentials=INI"):
        address.resolve("synister_v3")
    with pytest.raises(UserError, match="not both"):
        address.resolve("mongodb://h/db", "db_credentials.ini")


def write_predictions(path: pathlib.Path, table: pa.Table, seed: int = 0) -> pa.Table:
    """Predictions of the rows: every fifth without one, for one reason or another."""
    rng = np.random.default_rng(seed)
    values = rng.random((len(table), len(CLASSES)), dtype=np.float32)
    values[::7, 0] = 1e-42  # not normal, and yet exact
    status = np.array(["ok", "partly_outside"] * len(table))[: len(table)].astype(
        object
    )
    status[::5] = "missing_data"
    values[::5] = np.nan
    about = {"workdir": "runs/é", "step": 1000, "seed": seed}
    result = predictions.build(table, values, status, CLASSES, about)
    feather.write_feather(result, str(path), compression="zstd", chunksize=23)
    return result


def write_test_set(uri: str, path: pathlib.Path, overwrite: bool = False) -> bool:
    source = testset_predictions.open_feather(str(path))
    name = testset_predictions.test_set_name("skeleton", "fafb", 3, 1000)
    with databases.connect(uri) as database:
        return testset_predictions.write_test_set(database, name, source, overwrite)


def read_test_set(
    uri: str, output: pathlib.Path, classes: list[str] | None = None
) -> pa.Table:
    name = "skeleton_fafb_t3_p1000"
    with databases.connect(uri) as database:
        found = testset_predictions.read_test_set(database, name, classes, "there")
        synapses.write_batches(str(output), *found)
    return predictions.load(output)


def assert_same(found: pa.Table, expected: pa.Table) -> None:
    assert found.column_names == expected.column_names
    for name in found.column_names:
        if pa.types.is_floating(found[name].type):
            values = found[name].to_numpy(), expected[name].to_numpy()
            np.testing.assert_array_equal(*values)
        else:
            assert found[name].equals(expected[name]), name
    assert found.schema.types == expected.schema.types


def test_predictions_of_a_test_set(tmp_path: pathlib.Path, mongo_database: str) -> None:
    table = random_table(3)
    given = write_predictions(tmp_path / "p.feather", table)
    load_table(mongo_database, table)
    assert write_test_set(mongo_database, tmp_path / "p.feather")
    assert not write_test_set(mongo_database, tmp_path / "p.feather")
    stored = contents(f"{mongo_database}_predictions")["skeleton_fafb_t3_p1000"]
    values = predictions.probabilities(given).astype(float).tolist()
    expected = [
        {
            "_id": row["synapse_id"],
            "synapse_id": row["synapse_id"],
            "prediction": None if row["status"] == "missing_data" else value,
            "status": row["status"],
        }
        for row, value in zip(given.to_pylist(), values, strict=True)
    ]
    assert stored == typed(expected)
    found = read_test_set(mongo_database, tmp_path / "back.feather")
    assert_same(found, given)
    about = predictions.about(given) | {"source": "there"}
    assert predictions.about(found) == about
    np.testing.assert_array_equal(predictions.called(found), predictions.called(given))
    with pytest.raises(UserError, match="imported with the classes dopamine,gaba"):
        read_test_set(mongo_database, tmp_path / "b", ["gaba", "dopamine", "serotonin"])


def test_predictions_of_one_part(tmp_path: pathlib.Path, mongo_database: str) -> None:
    table = random_table(3)
    given = write_predictions(tmp_path / "p.feather", table)
    load_table(mongo_database, table)
    path = str(tmp_path / "p.feather")
    source = testset_predictions.open_feather(path, "b", "test")
    with databases.connect(mongo_database) as database:
        name = "skeleton_fafb_t3_p1000"
        assert testset_predictions.write_test_set(database, name, source, False)
        whole = testset_predictions.open_feather(path)
        with pytest.raises(UserError, match="give --overwrite"):
            testset_predictions.write_test_set(database, name, whole, False)
    found = read_test_set(mongo_database, tmp_path / "back.feather")
    assert_same(found, given.filter(pa.compute.equal(given["split_b"], "test")))
    with pytest.raises(UserError, match="no split 'c'"):
        testset_predictions.open_feather(path, "c", "test")


def test_predictions_that_the_original_wrote(
    tmp_path: pathlib.Path, mongo_database: str
) -> None:
    load_table(mongo_database, random_table(1))
    table = reading.load(mongo_database)
    ids = table["synapse_id"].to_pylist()
    with databases.connect(f"{mongo_database}_predictions") as database:
        collection = database["skeleton_fafb_t3_p1000"]
        collection.insert_many(
            [
                {"synapse_id": ids[2], "prediction": [0.1, 0.7, 0.2]},
                {"synapse_id": ids[0], "prediction": None},
            ]
        )
        output = tmp_path / "p.feather"
        with pytest.raises(UserError, match="_p1000 are; give --classes in the order"):
            read_test_set(mongo_database, output)
        found = read_test_set(mongo_database, output, list(CLASSES))
        assert found["synapse_id"].to_pylist() == [ids[2], ids[0]]
        assert found["neuron_id"][0] == table["neuron_id"][2]
        assert found["status"].to_pylist() == [None, None]
        assert predictions.called(found).tolist() == [1, -1]
        with pytest.raises(UserError, match="'glu' is unknown or there twice"):
            read_test_set(mongo_database, output, ["glu", "gaba"])
        two = rf"synapse {ids[2]}: prediction \[.*\], not a list of 2 numbers"
        with pytest.raises(UserError, match=two):
            read_test_set(mongo_database, output, ["gaba", "dopamine"])
        collection.insert_one({"synapse_id": -5, "prediction": [1.0, 0.0, 0.0]})
        with pytest.raises(UserError, match=r"synapse -5 is not in \w+\.synapses"):
            read_test_set(mongo_database, output, list(CLASSES))
        collection.update_one({"synapse_id": -5}, {"$set": {"synapse_id": ids[0]}})
        with pytest.raises(UserError, match=f"has synapse {ids[0]} twice"):
            read_test_set(mongo_database, output, list(CLASSES))
        collection.update_one({"synapse_id": ids[2]}, {"$set": {"synapse_id": 1.5}})
        with pytest.raises(UserError, match=r"synapse 1\.5: id 1\.5, not an integer"):
            read_test_set(mongo_database, output, list(CLASSES))
        collection.drop()
        with pytest.raises(UserError, match="has no collection skeleton_fafb_t3_p1000"):
            read_test_set(mongo_database, output, list(CLASSES))


def test_predictions_interrupted_anywhere(
    tmp_path: pathlib.Path, mongo_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.feather"
    write_predictions(path, random_table(3).slice(0, 9))
    write_test_set(mongo_database, path)
    undisturbed = contents(f"{mongo_database}_predictions")

    def run() -> bool:
        return write_test_set(mongo_database, path)

    for at in interrupted_anywhere(monkeypatch, lambda: drop(mongo_database), run):
        run()
        assert contents(f"{mongo_database}_predictions") == undisturbed, at


def write_brain(
    uri: str, path: pathlib.Path, number: int, overwrite: bool = False
) -> bool:
    source = testset_predictions.open_feather(str(path))
    with databases.connect(uri) as database:
        return brain_predictions.write_brain(
            database, "partners", number, source, overwrite
        )


def read_brain(uri: str, number: int, output: pathlib.Path) -> pa.Table:
    with databases.connect(uri) as database:
        found = brain_predictions.read_brain(
            database, "partners", number, None, "there"
        )
        mongo_brain_rows = synapses.write_batches(str(output), *found)
    result = predictions.load(output)
    assert len(result) == mongo_brain_rows
    return result


def brain_table(count: int = 30) -> pa.Table:
    """Ids and positions, some of them bad: what a whole brain knows of a synapse."""
    rng = np.random.default_rng(count)
    z = rng.integers(0, 10**6, count) * 40.0
    z[3:4] = np.nan
    columns = {"synapse_id": 2**60 + rng.permutation(count), "z_nm": z}
    columns |= {"y_nm": rng.random(count) * 1e6, "x_nm": np.arange(count) * 1.0}
    return synapses.conform(pa.table(columns), "here", answer_all=True)


def test_predictions_of_a_brain(tmp_path: pathlib.Path, mongo_database: str) -> None:
    table = brain_table()
    given = write_predictions(tmp_path / "8.feather", table)
    assert write_brain(mongo_database, tmp_path / "8.feather", 8)
    assert not write_brain(mongo_database, tmp_path / "8.feather", 8)
    with databases.connect(mongo_database) as database:
        keys = [i["key"] for i in database.partners.index_information().values()]
        # nx-27017 does not tell of an index on this field.
        assert [("id", 1)] in keys or not is_real(database)
        stored = typed(list(database.partners.find()))
    expected = []
    for row in given.to_pylist():
        document = {"_id": row["synapse_id"], "id": row["synapse_id"]}
        document |= {"pre_x": int(row["x_nm"]), "pre_y": row["y_nm"]}
        bad = np.isnan(row["z_nm"])
        document |= {"pre_z": None if bad else int(row["z_nm"])}
        document |= {"status_8": row["status"]}
        if row["status"] != "missing_data":
            names = [predictions.probability_column(name) for name in CLASSES]
            document["nts_8"] = {n: row[c] for n, c in zip(CLASSES, names, strict=True)}
        expected.append(document)
    assert stored == typed(expected)
    assert_same(read_brain(mongo_database, 8, tmp_path / "back.feather"), given)

    # Another network's, of fewer synapses in another order.
    other = write_predictions(
        tmp_path / "9.feather", table.take(pa.array([5, 4, 20, 1])), 1
    )
    assert write_brain(mongo_database, tmp_path / "9.feather", 9)
    assert not write_brain(mongo_database, tmp_path / "9.feather", 9)
    assert_same(read_brain(mongo_database, 8, tmp_path / "back.feather"), given)
    found = read_brain(mongo_database, 9, tmp_path / "back.feather")
    assert found["synapse_id"].equals(given["synapse_id"])
    assert found["status"].null_count == len(table) - 4
    assert_same(found.take(pa.array([5, 4, 20, 1])), other)


def test_replacing_predictions_of_a_brain(
    tmp_path: pathlib.Path, mongo_database: str
) -> None:
    table = brain_table()
    write_predictions(tmp_path / "a.feather", table)
    fewer = write_predictions(tmp_path / "b.feather", table.slice(2, 9), 1)
    write_brain(mongo_database, tmp_path / "a.feather", 8)
    before = contents(mongo_database)
    with pytest.raises(
        UserError, match="24 documents of .*partners have nts_8 already"
    ):
        write_brain(mongo_database, tmp_path / "b.feather", 8)
    assert contents(mongo_database) == before
    assert write_brain(mongo_database, tmp_path / "b.feather", 8, overwrite=True)
    found = read_brain(mongo_database, 8, tmp_path / "back.feather")
    assert_same(found.slice(2, 9), fewer)
    assert (predictions.called(found) >= 0).sum() == 7
    with pytest.raises(UserError, match="nts_8 already"):
        write_brain(mongo_database, tmp_path / "a.feather", 8)


def test_predictions_of_unknown_synapses(
    tmp_path: pathlib.Path, mongo_database: str
) -> None:
    write_predictions(tmp_path / "8.feather", brain_table(6))
    write_predictions(tmp_path / "9.feather", brain_table(13))
    write_brain(mongo_database, tmp_path / "8.feather", 8)
    before = contents(mongo_database)
    first = ", ".join(str(2**60 + i) for i in range(6, 11))
    message = rf"7 synapses .* not in \w+\.partners \({first}, …\)"
    with pytest.raises(UserError, match=message):
        write_brain(mongo_database, tmp_path / "9.feather", 9)
    assert contents(mongo_database) == before


@pytest.mark.parametrize("what", ["new", "added", "replaced"])
def test_predictions_of_a_brain_interrupted_anywhere(
    tmp_path: pathlib.Path,
    mongo_database: str,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    table = brain_table(11)
    first, path = tmp_path / "a.feather", tmp_path / "b.feather"
    write_predictions(first, table)
    write_predictions(path, table.slice(1, 9), 1)
    number = {"new": 8, "added": 9, "replaced": 8}[what]

    def start() -> None:
        drop(mongo_database)
        if what != "new":
            write_brain(mongo_database, first, 8)

    def run() -> bool:
        return write_brain(mongo_database, path, number, overwrite=what == "replaced")

    start()
    run()
    undisturbed = contents(mongo_database)
    points = 0
    for points in interrupted_anywhere(monkeypatch, start, run):
        run()
        assert contents(mongo_database) == undisturbed, points
    assert points > 15


@pytest.mark.parametrize("number", [8, 9])
def test_a_half_made_brain_is_replaced_by_another_file(
    tmp_path: pathlib.Path,
    mongo_database: str,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    table = brain_table(11)
    half, path = tmp_path / "a.feather", tmp_path / "b.feather"
    write_predictions(half, table)
    write_predictions(path, table.slice(0, 3), 1)  # lies in the half that is there
    monkeypatch.setattr(databases, "BATCH_DOCUMENTS", 4)
    with monkeypatch.context() as patch:
        interrupt(patch, 11)
        with pytest.raises(Interrupted):
            write_brain(mongo_database, half, 8)
    with databases.connect(mongo_database) as database:
        [name] = set(database.list_collection_names()) - {databases.IMPORTS}
        assert 3 < database[name].count_documents({}) < 11
    assert write_brain(mongo_database, path, number)
    with databases.connect(mongo_database) as database:
        assert database[name].count_documents({}) == 3
    assert not write_brain(mongo_database, path, number)


def test_a_brain_that_the_original_wrote(
    tmp_path: pathlib.Path, mongo_database: str
) -> None:
    output = tmp_path / "p.feather"
    with databases.connect(mongo_database) as database:
        position = {"pre_x": 1, "pre_y": 2, "pre_z": 3.5, "cypher_id": "x"}
        database.partners.insert_many(
            [
                {"id": BIG, **position, "nts_3": {"gaba": 0.25, "dopamine": 0.75}},
                {"id": 7, **position},
                {"id": 8, **position, "nts_3": {"dopamine": 0.5, "gaba": 0.5}},
            ]
        )
        with pytest.raises(UserError, match=r"no document of \w+\.partners has nts_4"):
            read_brain(mongo_database, 4, output)
        found = read_brain(mongo_database, 3, output)
        assert predictions.classes(found) == ("gaba", "dopamine")
        assert found["synapse_id"].to_pylist() == [BIG, 7, 8]
        assert found["z_nm"].to_pylist() == [3.5] * 3
        expected = [[0.25, 0.75], [np.nan] * 2, [0.5, 0.5]]
        np.testing.assert_array_equal(predictions.probabilities(found), expected)
        # Predictions are added by id to documents that are not ours.
        table = brain_table(3).set_column(0, "synapse_id", pa.array([8, BIG, 7]))
        write_predictions(tmp_path / "4.feather", table)
        assert write_brain(mongo_database, tmp_path / "4.feather", 4)
        names = [set(d) & {"nts_3", "nts_4"} for d in database.partners.find()]
        assert names == [{"nts_3", "nts_4"}, {"nts_4"}, {"nts_3"}]

        for change, message in [
            ({"nts_3": {"gaba": 1.0}}, f"id {BIG}: nts_3 .* not a number for each of"),
            ({"nts_3": [1.0, 0.0]}, f"id {BIG}: nts_3 .* not a number for each of"),
            (
                {"nts_3": {"gaba": "1", "dopamine": 0.0}},
                f"id {BIG}: .*'1', not a number",
            ),
            ({"pre_x": "1"}, f"id {BIG}: coordinate '1', not a number"),
            ({"id": 1.5}, r"id 1\.5: id 1\.5, not an integer"),
            ({"id": 7}, "has synapse 7 twice"),
        ]:
            document = database.partners.find_one({"id": BIG})
            key = {"_id": document["_id"]}
            database.partners.update_one(key, {"$set": change})
            with pytest.raises(UserError, match=message):
                source = brain_predictions.read_brain(
                    database, "partners", 3, ["gaba", "dopamine"], "there"
                )
                synapses.write_batches(str(output), *source)
            database.partners.replace_one(key, document)


def test_what_is_no_prediction_table(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "t.feather"
    feather.write_feather(random_table(1), str(path))
    with pytest.raises(UserError, match="is not a prediction table"):
        testset_predictions.open_feather(str(path))
    path.write_text("no")
    with pytest.raises(UserError, match="cannot read predictions"):
        testset_predictions.open_feather(str(path))
    table = random_table(1)
    write_predictions(path, pa.concat_tables([table, table]))
    with pytest.raises(UserError, match=r"has synapse \d+ twice"):
        testset_predictions.open_feather(str(path)).count()


@pytest.mark.parametrize("name", ["imports", "", "a b", "$a", "9a"])
def test_names_that_no_collection_can_have(name: str) -> None:
    with pytest.raises(UserError, match="no collection can be called"):
        testset_predictions.check_name(name)


def test_pymongo_is_not_needed_to_load_files() -> None:
    code = (
        "from synister_jax.tables import reading; import sys; "
        "print('pymongo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
    assert pymongo.version_tuple >= (4, 10)
