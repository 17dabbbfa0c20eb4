# SPDX-License-Identifier: Apache-2.0
"""Tests of the process that computes, with a store but without a web server."""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.ondemand import answering, questions, sources
from synister_jax.serve import served_models, tokens
from synister_jax.serve.records import NewJob
from synister_jax.serve.store import Store, StoredJob
from synister_jax.serve.worker import Worker
from synister_jax.tables import predictions

pytestmark = pytest.mark.long

BATCH = 8


class Service:
    """A state folder with a token and two models (one broken), and its workers."""

    def __init__(
        self, root: pathlib.Path, run: pathlib.Path, volume: pathlib.Path
    ) -> None:
        self.models, self.state = root / "models", root / "state"
        self.models.mkdir()
        (self.models / "models.toml").write_text(
            f'[tiny]\nworkdir = "{run}"\nvolume = "{volume}"\n'
            f'[broken]\nworkdir = "{run}"\nvolume = "{root}/nothing.n5"\n'
        )
        (self.state / "jobs").mkdir(parents=True)
        self.store = Store(self.state / "service.sqlite")
        tokens.add(self.store.database, "me")  # this is token 1
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "synister_jax.serve.worker"),
                *(f"--models={self.models}", f"--state={self.state}"),
                *(f"--name={name}", f"--batch_size={BATCH}"),
            ],
            stdin=subprocess.PIPE,
        )
        self.processes.append(process)
        return process

    def submit(self, job_id: str, rows: int, model: str = "tiny") -> StoredJob:
        columns = {
            "position_id": pa.array(range(rows), pa.int64()),
            "neuron_id": pa.array([i % 5 for i in range(rows)], pa.int64()),
            "x": pa.array([40.0 + i % 500 for i in range(rows)]),
            "y": pa.array([60.0 + i % 400 for i in range(rows)]),
            "z": pa.array([100.0 + i % 700 for i in range(rows)]),
        }
        folder = self.state / "jobs" / job_id
        folder.mkdir()
        feather.write_feather(pa.table(columns), str(folder / "asked.feather"))
        new = NewJob(
            job_id, 1, model, "none", "positions", "name", rows, 0, None, job_id
        )
        return self.store.submit(new, most_jobs=20, most_bytes=1 << 40)[0]

    def wait(self, job_id: str, what: Callable[[StoredJob], bool]) -> StoredJob:
        until = time.monotonic() + 90
        while time.monotonic() < until:
            job = self.store.job(job_id, 1)
            assert job is not None
            if what(job):
                return job
            time.sleep(0.05)
        raise AssertionError(f"nothing came of it: {job}")


@pytest.fixture
def service(
    tmp_path: pathlib.Path, trained_run: pathlib.Path, volume_path: pathlib.Path
) -> Iterator[Service]:
    service = Service(tmp_path, trained_run, volume_path)
    yield service
    for process in service.processes:
        process.kill()
        process.wait()
        process.stdin.close()
    service.store.close()


def test_job_is_answered_as_the_command_answers(
    service: Service,
    tmp_path: pathlib.Path,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
) -> None:
    service.submit("a" * 16, 50)
    service.start("w1")
    job = service.wait("a" * 16, lambda job: job.state == "done")
    assert job.rows == 50 and job.bytes > 0 and job.attempts == 1
    folder = service.state / "jobs" / job.id
    asked = questions.Asked(
        "positions", feather.read_table(folder / "asked.feather", memory_map=False)
    )
    step = answering.choose_step(trained_run, "best")
    network = answering.OpenNetwork.open(trained_run, step, str(volume_path), BATCH)
    answering.answer(
        asked,
        network,
        sources.settings("none"),
        tmp_path / "own",
        lambda *told: None,
    )
    # The worker has another number of devices, so the results differ by rounding.
    ours = predictions.load(tmp_path / "own" / "predictions.feather")
    its = predictions.load(folder / "predictions.feather")
    assert its["synapse_id"].to_pylist() == ours["synapse_id"].to_pylist()
    np.testing.assert_allclose(
        predictions.probabilities(its), predictions.probabilities(ours), atol=1e-6
    )
    reports = service.store.reports()
    assert reports["tiny"].ready and reports["tiny"].step == step
    assert not reports["broken"].ready
    assert "log of the server says why" in reports["broken"].problem


@pytest.mark.slow
def test_killed_in_the_middle_another_goes_on(service: Service) -> None:
    service.submit("b" * 16, 4_000)
    first = service.start("w1")
    written = service.state / "jobs" / ("b" * 16) / "parts"
    service.wait("b" * 16, lambda job: any(written.glob("*.feather")))
    first.kill()
    first.wait()
    parts = list(written.glob("*.feather"))
    kept = {path.name: path.stat().st_mtime_ns for path in parts}
    assert service.store.job("b" * 16, 1).state == "running"
    assert service.store.requeue_lost(["w2"]) == 1
    service.start("w2")
    job = service.wait("b" * 16, lambda job: job.state == "done")
    assert job.attempts == 2
    folder = service.state / "jobs" / job.id
    for path in parts:  # finished parts were not computed again
        assert path.stat().st_mtime_ns == kept[path.name]
    table = predictions.load(folder / "predictions.feather")
    assert table["synapse_id"].to_pylist() == list(range(4_000))


def test_cancelled_leaves_room_for_the_next_and_points_pass(service: Service) -> None:
    service.submit("c" * 16, 20_000)
    service.submit("d" * 16, 10)
    worker = service.start("w1")
    service.wait("c" * 16, lambda job: job.done > 8)
    point = service.store.points.ask(1, "tiny", "none", 160.0, 160.0, 160.0)
    wrong = service.store.points.ask(1, "broken", "none", 160.0, 160.0, 160.0)
    until = time.monotonic() + 20
    while service.store.points.result(point) is None and time.monotonic() < until:
        time.sleep(0.02)
    answer = service.store.points.result(point)
    assert service.store.job("c" * 16, 1).state == "running"
    assert answer["status"] == "ok"
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    top = max(answer["probabilities"], key=answer["probabilities"].get)
    assert answer["neurotransmitter_name"] == top
    assert "cannot be used" in service.store.points.result(wrong)["problem"]
    service.store.cancel("c" * 16, 1)
    service.wait("d" * 16, lambda job: job.state == "done")
    assert service.store.job("c" * 16, 1).state == "cancelled"
    assert worker.poll() is None


def test_leaves_when_the_server_goes_and_the_job_waits(service: Service) -> None:
    service.submit("e" * 16, 20_000)
    worker = service.start("w1")
    service.wait("e" * 16, lambda job: job.done > 8)
    worker.stdin.close()
    assert worker.wait(timeout=10) == 0
    job = service.store.job("e" * 16, 1)
    assert job.state == "queued" and job.attempts == 0


def test_what_cannot_be_done_is_told(service: Service, tmp_path: pathlib.Path) -> None:
    service.submit("f" * 16, 5, model="broken")
    found = served_models.load(service.models)
    worker = Worker(service.store, found, service.state, "w1", BATCH, 10, None)
    worker.open_models()
    job = service.store.claim("w1")
    worker._do(job)
    job = service.store.job("f" * 16, 1)
    assert job.state == "failed" and "cannot be used" in job.message
    # The worker also survives a job whose request is damaged.
    service.submit("0" * 16, 5)
    (service.state / "jobs" / ("0" * 16) / "asked.feather").write_bytes(b"nothing")
    worker._do(service.store.claim("w1"))
    job = service.store.job("0" * 16, 1)
    assert job.state == "failed" and "unexpected error" in job.message
    assert json.dumps(job.message)


def test_begun_with_something_else_it_begins_anew(service: Service) -> None:
    """This happens after a restart with another batch size or another synapse table."""
    found = served_models.load(service.models)
    worker = Worker(service.store, found, service.state, "w1", BATCH, 10, None)
    worker.open_models()
    job = service.submit("1" * 16, 5)
    folder = service.state / "jobs" / job.id
    (folder / "request.json").write_text('{"kind": "neurons"}')
    (folder / "synapses.feather").write_bytes(b"of that")
    worker._do(service.store.claim("w1"))
    assert service.store.job(job.id, 1).state == "done"
    table = predictions.load(folder / "predictions.feather")
    assert table["synapse_id"].to_pylist() == list(range(5))


def test_step_that_was_asked_for_is_used(service: Service) -> None:
    found = served_models.load(service.models)
    worker = Worker(service.store, found, service.state, "w1", BATCH, 10, None)
    new = NewJob("9" * 16, 1, "tiny", "none", "positions", "name", 1, 0, 20, "key")
    service.store.submit(new, most_jobs=20, most_bytes=1 << 40)
    columns = {"position_id": [1], "neuron_id": [None], "x": [160.0]}
    table = pa.table(columns | {"y": [160.0], "z": [160.0]})
    folder = service.state / "jobs" / ("9" * 16)
    folder.mkdir()
    table = table.cast(questions.POSITIONS)
    feather.write_feather(table, str(folder / "asked.feather"))
    worker.open_models()
    worker._do(service.store.claim("w1"))
    assert service.store.job("9" * 16, 1).state == "done"
    about = json.loads((folder / "answer.json").read_text())
    assert about["model"]["step"] == 20
