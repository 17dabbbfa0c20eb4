# SPDX-License-Identifier: Apache-2.0
"""A few clients use the web page at once for some seconds."""

import asyncio
import pathlib

import pyarrow as pa
import pytest

from tests.serve.fuzzing import load, page_server

ROWS = 5


@pytest.mark.slow
def test_every_job_of_many_clients_is_answered(
    tmp_path: pathlib.Path,
    short_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    table = page_server.write_models(tmp_path, short_run, volume_path, synapse_table)
    names = ["first", "second", "third"]
    with page_server.running(str(tmp_path), names, *load.LIFTED) as server:
        clients = load.Load(server, table, ROWS)
        asyncio.run(clients.run(pollers=7, submitters=3, seconds=3, flat_out=1))
        assert page_server.FRAME not in server.log()
    assert clients.errors == []
    assert clients.finished == len(clients.submitted) >= len(names)
    assert set(clients.requests) == {"submit", "status", "predictions.csv"}
    assert clients.requests["predictions.csv"]["200"] == clients.finished
    assert clients.requests["status"]["200"] > 50
