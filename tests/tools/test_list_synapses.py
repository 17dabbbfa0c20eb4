# SPDX-License-Identifier: Apache-2.0
"""Tests the listing of a whole volume by a command that is killed and started again."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tensorstore as ts

from synister_jax.tables import reading
from tests.helpers import commands
from tests.helpers.service_servers import Answer, NeuPrint, make_certificate
from tests.helpers.small_data import ROOT

pytestmark = pytest.mark.long

TOOL = ROOT / "tools" / "list_synapses.py"
SHAPE_ZYX = (60, 50, 40)


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[NeuPrint]:
    try:
        certificate = make_certificate(tmp_path)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    random = np.random.default_rng(0)
    places = random.permutation(40 * 50 * 60)[:6_000]
    x, y, z = np.unravel_index(places, (60, 40, 50))  # neuPrint's x is the N5's z
    bodies: dict[int, list[tuple[int, int, int]]] = {}
    for i, xyz in enumerate(zip(x.tolist(), y.tolist(), z.tolist(), strict=True)):
        bodies.setdefault(1_000 + i % 4_500, []).append(xyz)
    server = NeuPrint(certificate, bodies)
    yield server
    server.close()


@pytest.fixture
def volume(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "volume.n5"
    spec = {
        "driver": "n5",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "dimensions": SHAPE_ZYX[::-1],
            "blockSize": SHAPE_ZYX[::-1],
            "dataType": "uint8",
            "compression": {"type": "gzip"},
            "resolution": [8, 8, 8],
        },
        "create": True,
    }
    ts.open(spec).result()
    return path


def environment(server: NeuPrint, tmp_path: pathlib.Path) -> dict[str, str]:
    return {
        "REQUESTS_CA_BUNDLE": str(tmp_path / "certificate.pem"),
        "NEUPRINT_SERVER": server.url,
        "NEUPRINT_APPLICATION_CREDENTIALS": "neuprint-token",
    }


def start(
    server: NeuPrint, tmp_path: pathlib.Path, *flags: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, TOOL, *flags],
        env=os.environ | environment(server, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(server: NeuPrint, tmp_path: pathlib.Path, *flags: str) -> tuple[int, str, str]:
    done = commands.run(str(TOOL), *flags, environment=environment(server, tmp_path))
    return done.returncode, done.stdout, done.stderr


def checksum(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_killed_and_started_again_it_has_the_same_bytes(
    server: NeuPrint, volume: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    flags = ["--source=hemibrain", f"--volume={volume}"]
    whole, killed = tmp_path / "whole.feather", tmp_path / "killed.feather"
    code, output, errors = run(server, tmp_path, *flags, f"--output={whole}")
    assert (code, errors) == (0, "")
    assert f"{whole}: 6,000 synapses" in output

    pages = killed.with_name("killed.feather.pages")
    process = start(server, tmp_path, *flags, f"--output={killed}")
    deadline = time.monotonic() + 60
    while not list(pages.glob("page-*.feather")):
        assert time.monotonic() < deadline and process.poll() is None
        server.faults = ["slow"]  # so that the command cannot finish
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not killed.exists()
    server.faults = []
    before = len(server.asked)
    code, output, errors = run(server, tmp_path, *flags, f"--output={killed}")
    assert (code, errors) == (0, "")
    assert "continuing after" in output
    assert not pages.exists()
    cyphers = [json.loads(r.body)["cypher"] for r in server.asked[before:] if r.body]
    assert "n.bodyId > -1 " not in cyphers[0]
    assert checksum(killed) == checksum(whole)

    table = reading.load(whole)
    assert len(table) == 6_000
    assert table["neuron_id"].to_pylist() == sorted(table["neuron_id"].to_pylist())
    # Computed by hand: z nm = (60 - 1 - x) · 8, y nm = z · 8, x nm = y · 8
    x, y, z = server.bodies[1_000][0]
    row = table.filter(np.equal(table["synapse_id"], (z << 42) + (y << 21) + x))
    assert row.select(["z_nm", "y_nm", "x_nm", "neuron_id"]).to_pylist() == [
        {
            "z_nm": 8.0 * (59 - x),
            "y_nm": 8.0 * z,
            "x_nm": 8.0 * y,
            "neuron_id": 1_000,
        }
    ]
    about = json.loads(table.schema.metadata[b"synister_jax"])
    assert about["dataset"] == "hemibrain:v1.2.1"
    assert about["coordinates"]["shape_zyx"] == list(SHAPE_ZYX)
    assert sum(len(t) for t in reading.open(whole).tables()) == 6_000


def test_who_has_no_listing_is_refused_at_once(
    server: NeuPrint, volume: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    flags = ["--source=fafb-flywire", f"--volume={volume}"]
    code, _, errors = run(server, tmp_path, *flags, f"--output={tmp_path}/o.feather")
    assert (code, errors.count("\n")) == (1, 1)
    assert "zenodo.10676866" in errors
    assert not list(tmp_path.glob("o.feather*"))


def test_a_service_that_refuses_is_told(
    server: NeuPrint, volume: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    server.faults = [Answer(401, b'{"message": "expired"}')]
    flags = ["--source=hemibrain", f"--volume={volume}"]
    code, _, errors = run(server, tmp_path, *flags, f"--output={tmp_path}/o.feather")
    assert (code, errors.count("\n")) == (1, 1)
    assert (
        "refuses access (401: expired): set NEUPRINT_APPLICATION_CREDENTIALS" in errors
    )
    assert "neuprint-token" not in errors
