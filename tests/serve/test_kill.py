# SPDX-License-Identifier: Apache-2.0
"""A service that is killed continues its jobs; no row is lost or done twice."""

import os
import pathlib
import signal
import time

import httpx
import numpy as np
import pytest

from synister_jax.serve.store import Store
from tests.helpers import serving

# The job has enough rows that it is not done when the server stops a second time.
ROWS = 8_000


@pytest.fixture
def models_folder(
    tmp_path: pathlib.Path, short_run: pathlib.Path, volume_path: pathlib.Path
) -> pathlib.Path:
    """A folder with one model, whose small network really computes."""
    return serving.write_models(
        tmp_path, workdir=str(short_run), volume=str(volume_path)
    )


def rows(count: int) -> str:
    rng = np.random.default_rng(0)
    xyz = rng.integers(0, (640, 640, 960), (count, 3))
    lines = (f"{n},{n % 40},{x},{y},{z}" for n, (x, y, z) in enumerate(xyz))
    return "id,skid,x,y,z\n" + "\n".join(lines) + "\n"


def submit(client: httpx.Client, text: str, **values: str) -> httpx.Response:
    values = {"model": "small"} | values
    return client.post("/api/jobs", params=values, content=text, headers=serving.CSV)


def ready(client: httpx.Client) -> bool:
    return client.get("/api/models").json()[0]["ready"]


def workers_of(server: serving.Command) -> list[int]:
    """Returns the process ids of the server's workers."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            line = (path.parent / "cmdline").read_bytes()
        except OSError:  # the process has just ended
            continue
        if parent == server.process.pid and b"synister_jax.serve.worker" in line:
            found.append(int(path.parent.name))
    return found


def done_more(client: httpx.Client, job_id: str, than: int) -> int:
    """Waits until more than `than` rows are done; returns their number."""

    def ask() -> int | None:
        job = client.get(f"/api/jobs/{job_id}").json()
        assert job["state"] in ("queued", "running"), job
        return job["done"] if job["stage"] == "predicting" and job["done"] > than else 0

    return serving.wait_for(ask, 90)


@pytest.mark.slow
def test_killed_worker_and_killed_server(models_folder: pathlib.Path) -> None:
    text, few = rows(ROWS), "--batch_size=1"
    with serving.Command(models_folder, few) as server, server.client() as client:
        token = server.token
        serving.wait_for(lambda: ready(client), 60)
        job = submit(client, text).json()
        done = done_more(client, job["id"], 600)
        [worker] = workers_of(server)
        os.kill(worker, signal.SIGKILL)
        serving.wait_for(lambda: workers_of(server) not in ([], [worker]))
        assert done_more(client, job["id"], done) < ROWS
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL

    with serving.Command(models_folder, few) as server, server.client(token) as client:
        assert server.token is None  # a token exists already
        done = done_more(client, job["id"], done)
        again = submit(client, text)
        assert (again.status_code, again.json().get("id")) == (200, job["id"])
        began = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 15

    store = Store(models_folder / "service" / "service.sqlite")
    [kept] = store.jobs(1)
    store.close()
    assert kept.state == "queued" and kept.worker is None and kept.done >= done

    with serving.Command(models_folder, few) as server, server.client(token) as client:
        over = serving.finished(client, job["id"], 120)
        assert over["state"] == "done" and over["answer"]["rows"] == ROWS
        assert len(client.get("/api/jobs").json()["jobs"]) == 1
        again = submit(client, text)
        assert (again.status_code, again.json()["id"]) == (200, job["id"])
        # The answer equals that of a job without any interruption.
        fresh = submit(client, text, fresh="true").json()
        assert fresh["id"] != job["id"]
        serving.finished(client, fresh["id"], 120)
        first, second = (
            client.get(f"/api/jobs/{each['id']}/predictions.csv").content
            for each in (job, fresh)
        )
        assert first == second and first.count(b"\n") == ROWS + 1
        ids = [line.split(b",")[0] for line in first.splitlines()[1:]]
        assert ids == [str(n).encode() for n in range(ROWS)]
        point = client.get("/fetch-neurotransmitter?x=300&y=300&z=400").json()
        assert point["status"] == "ok"
        assert sum(point["probabilities"].values()) == pytest.approx(1)
        assert server.stop(signal.SIGINT) == 0


@pytest.mark.long
def test_one_server_a_folder(tmp_path: pathlib.Path) -> None:
    models_folder = serving.write_models(tmp_path)
    with serving.Command(models_folder) as server:
        with pytest.raises(AssertionError, match="another process is at work"):
            serving.Command(models_folder)
        assert server.stop() == 0
    assert server.token not in "\n".join(server.output[2:])
