# SPDX-License-Identifier: Apache-2.0
"""Tables and documents for the tests of MongoDB, and ways to interrupt writes."""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather
from pymongo.collection import Collection
from pymongo.database import Database

from synister_jax.tables import predictions, synapses
from synister_jax.tables.mongo import (
    databases,
    testset_predictions,
)

CLASSES = ("dopamine", "gaba", "acetylcholine")


BIG = 2**60 + 1  # a double cannot hold this number


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


# The documents as the original's import writes them; our import adds `_id`.
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
    """Returns a value that is equal only if the types are equal too: 1 is not 1.0."""
    if isinstance(value, dict):
        return {key: typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [typed(each) for each in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return (int, int(value))  # bson has another type for wide integers
    return (type(value), value)


def contents(uri: str) -> dict[str, list]:
    """Returns all documents of each collection, in natural order."""
    with databases.connect(uri) as database:
        names = sorted(database.list_collection_names())
        return {name: typed(list(database[name].find())) for name in names}


def is_real(database: Database) -> bool:
    """Returns whether this is MongoDB's own server, which keeps names of indexes."""
    return "version" in database.client.server_info()


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


class Interrupted(BaseException):
    """Stands for a kill -9 between two calls to the database server."""


WRITES = [
    *((Collection, name) for name in ("create_index", "replace_one")),
    *((Collection, name) for name in ("insert_many", "bulk_write", "update_many")),
    *((Database, name) for name in ("create_collection", "drop_collection")),
]


def interrupt(patch: pytest.MonkeyPatch, at: int) -> None:
    """Makes the code raise `Interrupted` at the point with the number `at`.

    Each write has a point before it and a point after it. A write of a list also has a
    point after its first half.
    """
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
    """Interrupts `run` at its first, second, … point, and yields the point each time.

    `start` runs before every `run`. The last `run` ends without an interruption.
    """
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


def drop(uri: str) -> None:
    with databases.connect(uri) as database:
        for name in (database.name, f"{database.name}_predictions"):
            database.client.drop_database(name)


def write_predictions(path: pathlib.Path, table: pa.Table, seed: int = 0) -> pa.Table:
    """Writes and returns predictions; every fifth row has the status missing_data."""
    rng = np.random.default_rng(seed)
    values = rng.random((len(table), len(CLASSES)), dtype=np.float32)
    values[::7, 0] = 1e-42  # subnormal, and must stay exact
    status = np.array(["ok", "partly_outside"] * len(table))[: len(table)].astype(
        object
    )
    status[::5] = "missing_data"
    values[::5] = np.nan
    about = {"workdir": "runs/é", "step": 1000, "seed": seed}
    result = predictions.build(table, values, status, CLASSES, about)
    feather.write_feather(result, str(path), compression="zstd", chunksize=23)
    return result


def assert_same(found: pa.Table, expected: pa.Table) -> None:
    assert found.column_names == expected.column_names
    for name in found.column_names:
        if pa.types.is_floating(found[name].type):
            values = found[name].to_numpy(), expected[name].to_numpy()
            np.testing.assert_array_equal(*values)
        else:
            assert found[name].equals(expected[name]), name
    assert found.schema.types == expected.schema.types
