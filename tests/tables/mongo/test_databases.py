# SPDX-License-Identifier: Apache-2.0
"""Ground truth and predictions through a server, over TCP."""

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pymongo
import pytest
from pymongo import errors
from pymongo.collection import Collection

from synister_jax.base.errors import UserError
from synister_jax.tables import reading, synapses
from synister_jax.tables.mongo import (
    address,
    databases,
    documents,
    json_export,
)
from tests.helpers import mongo_server
from tests.helpers.mongo_server import load_table
from tests.helpers.mongo_tables import (
    IMPORTED,
    Interrupted,
    contents,
    drop,
    interrupt,
    interrupted_anywhere,
    is_real,
    random_table,
    typed,
    write_export,
)


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
    with pytest.raises(UserError, match="no record that this import wrote them"):
        load_table(mongo_database, first)


@pytest.mark.long
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
            # The other table can be imported again, wherever the import stopped.
            load_table(mongo_database, other, overwrite=True)
            assert reading.load(mongo_database).equals(other)
        run()
        assert contents(mongo_database) == undisturbed, points
    assert points > 30


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
    with pytest.raises(
        UserError, match="import .* is unfinished; run that import again"
    ):
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
        with pytest.raises(
            UserError, match="held other documents than those of this import"
        ):
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
        # An old database has no splits, no brain_region and no type. Its documents have
        # their own `_id`.
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
        database.skeletons.insert_one(dict(neuron))  # an identical document is allowed
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
        with pytest.raises(UserError, match="has split_new, which no synapse had when"):
            pa.Table.from_batches(batches, schema)


@pytest.mark.long
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


def test_pymongo_is_not_needed_to_load_files() -> None:
    code = (
        "from synister_jax.tables import reading; import sys; "
        "print('pymongo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
    assert pymongo.version_tuple >= (4, 10)
