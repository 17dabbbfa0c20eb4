# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.base.errors import UserError
from synister_jax.tables import predictions, reading, synapses
from synister_jax.tables.mongo import (
    databases,
    testset_predictions,
)
from tests.helpers.mongo_server import load_table
from tests.helpers.mongo_tables import (
    CLASSES,
    assert_same,
    contents,
    drop,
    interrupted_anywhere,
    random_table,
    typed,
    write_predictions,
)


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
        with pytest.raises(UserError, match="'glu' is unknown or given twice"):
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


@pytest.mark.long
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
