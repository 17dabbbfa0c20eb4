# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base.errors import UserError
from synister_jax.tables import predictions, synapses
from synister_jax.tables.mongo import (
    brain_predictions,
    databases,
    testset_predictions,
)
from tests.helpers.mongo_tables import (
    BIG,
    CLASSES,
    Interrupted,
    assert_same,
    contents,
    drop,
    interrupt,
    interrupted_anywhere,
    is_real,
    typed,
    write_predictions,
)


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
    """Returns ids and positions, which are all columns of a brain; one z is NaN."""
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
        # The test server nx-27017 does not list the index on this field.
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

    # Another network predicts fewer synapses, in another order.
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


@pytest.mark.long
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
    # These synapses are in the half that is written before the interruption.
    write_predictions(path, table.slice(0, 3), 1)
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
        # Predictions are added by id to documents that the original wrote.
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
