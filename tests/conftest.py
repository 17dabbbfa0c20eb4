# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: a small data set, trained runs, a MongoDB server, a browser.

The data set is an N5 volume, a table of synapses and shards. Each test session makes
these files once.
"""

import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

# This must be set before anything imports jax. Four CPU devices, and no search for
# accelerators, make the tests behave the same on every machine.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
# Many tests compile the same programs, and so do the commands that they start. All
# processes, also those of pytest-xdist, share the compiled programs in this folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import ml_collections
import numpy as np
import pyarrow as pa
import pytest

from synister_jax.em import volumes
from synister_jax.tables import synapses
from synister_jax.tables.mongo import databases
from synister_jax.training import training_run
from tests.helpers import mongo_server
from tests.helpers.small_data import (
    CLASSES,
    VOXEL_SIZE_NM_ZYX,
    synapse_rows,
    tiny_config,
    write_shards,
)

if TYPE_CHECKING:
    from playwright import sync_api


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that use a trained run as long: the first of them trains it."""
    for item in items:
        if {"trained_run", "short_run"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def volume_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A volume of 24 × 160 × 160 voxels: noise, and a blob at each labelled synapse.

    The grey value of a blob depends on the class.
    """
    rng = np.random.default_rng(0)
    array = rng.integers(60, 120, (24, 160, 160), dtype=np.uint8)
    table = synapse_rows()
    positions = synapses.positions_nm_zyx(table) / VOXEL_SIZE_NM_ZYX
    labels = synapses.labels(table, CLASSES)
    for (z, y, x), label in zip(positions.astype(int), labels, strict=True):
        if label >= 0:
            array[z - 1 : z + 1, y - 3 : y + 3, x - 3 : x + 3] = 90 + 80 * label
    path = tmp_path_factory.mktemp("volume") / "raw.n5"
    volumes.write_n5(path, array, VOXEL_SIZE_NM_ZYX, (0, 0, 0), (8, 32, 32))
    return path


@pytest.fixture(scope="session")
def synapse_table() -> pa.Table:
    """90 synapses of 18 neurons; every tenth synapse has no known neurotransmitter."""
    return synapse_rows()


@pytest.fixture(scope="session")
def shards_folder(
    tmp_path_factory: pytest.TempPathFactory,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> pathlib.Path:
    """Finished shards of the small data set for `tiny_config`."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    write_shards(folder, volume_path, synapse_table)
    return folder


@pytest.fixture(scope="session")
def short_config(shards_folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The configuration of `short_run`."""
    config = tiny_config()
    config.shards = str(shards_folder)
    config.num_train_steps = 20
    config.eval_every_steps = 20
    config.checkpoint_every_steps = 10
    return config


@pytest.fixture(scope="session")
def short_run(
    tmp_path_factory: pytest.TempPathFactory, short_config: ml_collections.ConfigDict
) -> pathlib.Path:
    """A run with checkpoints of steps 10 and 20.

    Its predictions are confident enough that a mistake of the code changes them.
    """
    folder = tmp_path_factory.mktemp("run") / "run"
    training_run.train(short_config, folder)
    return folder


@pytest.fixture(scope="session")
def trained_run(
    tmp_path_factory: pytest.TempPathFactory, shards_folder: pathlib.Path
) -> pathlib.Path:
    """A run with checkpoints of steps 20 and 40.

    Its predictions are confident enough that a test notices swapped rows.
    """
    config = tiny_config()
    config.shards = str(shards_folder)
    config.num_train_steps = 40
    config.eval_every_steps = 20
    config.checkpoint_every_steps = 20
    folder = tmp_path_factory.mktemp("run") / "run"
    training_run.train(config, folder)
    return folder


@pytest.fixture
def own_shards(tmp_path: pathlib.Path, shards_folder: pathlib.Path) -> pathlib.Path:
    """A copy of the finished shards for a test that changes them."""
    return shutil.copytree(shards_folder, tmp_path / "shards")


@pytest.fixture(scope="session")
def mongo_server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a server: SYNISTER_MONGO_URI if that is set, else of a new server."""
    if given := os.environ.get("SYNISTER_MONGO_URI"):
        yield given
        return
    server, uri = mongo_server.start(tmp_path_factory.mktemp("mongo"))
    yield uri
    server.terminate()
    server.wait()


@pytest.fixture
def mongo_database(mongo_server_uri: str) -> Iterator[str]:
    """The URI of a new database, which is dropped afterwards with its predictions."""
    name = f"synister_test_{uuid.uuid4().hex[:12]}"
    uri = mongo_server.with_database(mongo_server_uri, name)
    yield uri
    with databases.connect(uri) as database:
        for each in (name, f"{name}_predictions"):
            database.client.drop_database(each)


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    """The Chromium or Chrome of this machine; tests are skipped if there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is absent")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    with api.sync_playwright() as playwright:
        # Chromium's sandbox needs user namespaces, which containers often lack. The
        # tests open only our own pages, which need no sandbox.
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def table_path(
    tmp_path_factory: pytest.TempPathFactory, synapse_table: pa.Table
) -> pathlib.Path:
    """`synapse_table` as a Feather file."""
    path = tmp_path_factory.mktemp("table") / "synapses.feather"
    synapses.write(synapses.conform(synapse_table, "table"), path)
    return path
