# SPDX-License-Identifier: Apache-2.0
"""Tests of the queue: which worker gets a job, and what happens if a process dies."""

import concurrent.futures
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from synister_jax.serve import supervisor, tokens
from synister_jax.serve.records import LimitReached, NewJob, Revoked, StoredJob
from synister_jax.serve.store import MOST_ATTEMPTS, Store


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[Store]:
    store = Store(tmp_path / "service.sqlite")
    for name in ("ann", "bob"):
        tokens.add(store.database, name)
    yield store
    store.close()


def submit(
    store: Store, number: int, token_id: int = 1, key: str | None = None, **more: bool
) -> StoredJob:
    new = new_job(f"{number:016x}", key or str(number), token_id)
    return store.submit(new, most_jobs=100, most_bytes=10_000, **more)[0]


def new_job(job_id: str, key: str, token_id: int = 1) -> NewJob:
    return NewJob(job_id, token_id, "small", "none", "positions", "", 10, 100, 3, key)


def test_a_job_from_end_to_end(store: Store) -> None:
    job = submit(store, 1)
    assert (job.state, job.attempts, job.started) == ("queued", 0, None)
    claimed = store.claim("w")
    assert (claimed.id, claimed.state, claimed.worker) == (job.id, "running", "w")
    assert claimed.attempts == 1 and claimed.step == 3
    assert store.claim("v") is None
    assert store.tell(job.id, "w", "predicting", 40, 100)
    assert not store.tell(job.id, "v", "predicting", 90, 100)
    assert store.job(job.id, 1).eta_seconds is None  # this worker has done nothing yet
    time.sleep(0.05)
    assert store.tell(job.id, "w", "predicting", 60, 100)
    assert 0.1 <= store.job(job.id, 1).eta_seconds < 10
    assert not store.finish(job.id, "v", 100, 5)
    assert store.finish(job.id, "w", 100, 5)
    assert not store.fail(job.id, "w", "late") and not store.release(job.id, "w")
    done = store.job(job.id, 1)
    assert (done.state, done.rows, done.bytes, done.done) == ("done", 100, 5, 100)
    assert store.job(job.id, 2) is None
    assert store.used(1) == (0, 5) and store.used(2) == (0, 0)
    assert 0 < store.seconds_a_row("small") < 1


def test_turns_are_taken_by_token(store: Store) -> None:
    for number in range(4):
        submit(store, number)
    submit(store, 10, token_id=2)
    order = [int(store.claim(f"w{n}").id, 16) for n in range(5)]
    assert order == [0, 10, 1, 2, 3]


def test_one_worker_takes_turns_too(store: Store) -> None:
    for number in range(3):
        submit(store, number)
    submit(store, 10, token_id=2)
    order = []
    for _ in range(4):
        job = store.claim("w")
        store.finish(job.id, "w", 1, 1)
        order.append(int(job.id, 16))
    assert order == [0, 10, 1, 2]


def test_jobs_of_a_closed_model_wait(store: Store) -> None:
    job = submit(store, 1)
    assert store.claim("w", ["small"]) is None
    assert store.claim("w", ["large"]).id == job.id


def test_a_token_that_ended_asks_for_nothing(store: Store) -> None:
    tokens.revoke(store.database, "ann")
    with pytest.raises(Revoked):
        submit(store, 1)
    with pytest.raises(Revoked):
        store.points.ask(1, "small", "none", 1.0, 2.0, 3.0)
    submit(store, 2, token_id=2)


def test_the_same_request_is_one_job(store: Store) -> None:
    first = submit(store, 1, key="same")
    assert submit(store, 2, key="same").id == first.id
    assert submit(store, 3, token_id=2, key="same").id != first.id
    # `fresh` makes no new job while the old one is in progress.
    assert submit(store, 4, key="same", fresh=True).id == first.id
    store.claim("w")
    store.finish(first.id, "w", 10, 10)
    assert submit(store, 5, key="same").id == first.id
    fresh = submit(store, 6, key="same", fresh=True)
    assert fresh.id != first.id and submit(store, 7, key="same").id == fresh.id
    store.cancel(fresh.id, 1)
    assert submit(store, 8, key="same").id not in (first.id, fresh.id)


def test_limits(store: Store) -> None:
    submit(store, 1)
    with pytest.raises(LimitReached, match="1 unfinished jobs"):
        store.submit(new_job("f" * 16, "k"), most_jobs=1, most_bytes=9999)
    with pytest.raises(LimitReached, match="100 bytes and may take 150"):
        store.submit(new_job("f" * 16, "k"), most_jobs=9, most_bytes=150)


def test_a_job_that_stops_workers_is_given_up(store: Store) -> None:
    job = submit(store, 1)
    for attempt in range(1, MOST_ATTEMPTS + 1):
        assert store.claim(f"w{attempt}").attempts == attempt
        assert store.requeue_lost([f"w{attempt}"]) == 0
        lost = store.requeue_lost(["other"])
        assert lost == (attempt < MOST_ATTEMPTS)
    failed = store.job(job.id, 1)
    assert (failed.state, failed.message) == (
        "failed",
        "this job stopped its worker three times",
    )


def test_stops_of_the_server_are_not_the_jobs_fault(store: Store) -> None:
    job = submit(store, 1)
    store.report_model("small", 3, ["a"], True, None)
    for _ in range(2 * MOST_ATTEMPTS):
        assert store.claim("w").id == job.id
        assert store.start_over() == 1
        assert store.claim("w").id == job.id
        assert store.release(job.id, "w")
    assert store.job(job.id, 1).attempts == 0
    assert store.reports() == {}


def test_cancelled_while_it_finishes(store: Store) -> None:
    """If a job finishes and is cancelled at once, exactly one of the calls wins."""
    for number in range(20):
        job = submit(store, number)
        store.claim("w")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            finish = pool.submit(store.finish, job.id, "w", 1, 1)
            cancel = pool.submit(store.cancel, job.id, 1)
            told = cancel.result().state
        assert (told == "done") == finish.result()
        assert store.job(job.id, 1).state == told
        assert store.delete(job.id, 1) and not store.delete(job.id, 1)


def test_running_jobs_are_not_deleted(store: Store) -> None:
    job = submit(store, 1)
    store.claim("w")
    assert not store.delete(job.id, 1)
    store.cancel(job.id, 1)
    assert not store.delete(job.id, 2)
    assert store.delete(job.id, 1)
    assert not store.tell(job.id, "w", "predicting", 1, 2)


_CLAIMS = """
import sys
from synister_jax.serve.store import Store
import pathlib
store, name = Store(pathlib.Path(sys.argv[1])), sys.argv[2]
while (job := store.claim(name)) is not None:
    print(job.id, flush=True)
    if not job.number % 3:
        store.finish(job.id, name, 1, 1)
"""


@pytest.mark.long
def test_claims_of_several_processes_are_each_once(store: Store) -> None:
    """One of them is killed while it works; no job is lost, and none is done twice."""
    jobs = {submit(store, number).id for number in range(60)}
    path = str(store.database.path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _CLAIMS, path, f"w{n}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    started[0].stdout.readline()
    os.kill(started[0].pid, signal.SIGKILL)
    claimed = [line for p in started for line in p.communicate()[0].split()]
    assert len(claimed) == len(set(claimed))
    states = [store.job(job_id, 1).state for job_id in jobs]
    assert "queued" not in states
    # There are 41 if the process was killed between the claim of a job and its end.
    assert store.requeue_lost([]) == states.count("running") in (40, 41)
    while (job := store.claim("last")) is not None:
        assert store.finish(job.id, "last", 1, 1)
    assert {store.job(job_id, 1).state for job_id in jobs} == {"done"}


def test_points(store: Store) -> None:
    store.report_model("small", 3, ["a"], True, None)

    def ask(x: float, token_id: int = 1) -> int:
        return store.points.ask(token_id, "small", "none", x, 2, 3)

    first = ask(1)
    assert ask(1) == first and ask(1, token_id=2) != first
    [point, other] = store.points.claim("w")
    assert (point.id, point.x, type(point.x)) == (first, 1, float)
    assert store.points.claim("v") == [] and store.points.result(first) is None
    assert not store.points.answer(first, "v", {"status": "ok"})
    assert ask(1) == first and store.points.claim("v") == []  # in progress
    assert store.points.answer(first, "w", {"status": "ok"})
    assert store.points.result(first) == {"status": "ok"}
    assert ask(1) == first and store.points.claim("v") == []
    store.report_model("small", 4, ["a"], True, None)
    assert ask(1) == first and len(store.points.claim("w")) == 1  # the step has changed
    assert store.requeue_lost(["v"]) == 0  # no jobs, but the points are queued again
    assert {p.id for p in store.points.claim("v")} == {first, other.id}
    store.points.answer(first, "v", {"problem": "out of reach"})
    assert ask(1) == first and len(store.points.claim("v")) == 1  # computed again
    with pytest.raises(LimitReached, match="64 points"):
        for x in range(100):
            ask(1000 + x)
    store.points.forget(older_than_seconds=-1)
    assert store.points.result(first) is None


def test_clearing(store: Store, tmp_path: pathlib.Path) -> None:
    for number in range(4):
        submit(store, number)
        (tmp_path / "jobs" / f"{number:016x}").mkdir(parents=True)
    store.claim("w")
    store.fail(f"{0:016x}", "w", "no")
    store.cancel(f"{1:016x}", 1)
    store.delete(f"{2:016x}", 1)
    supervisor.clear(store, tmp_path)
    assert len(list((tmp_path / "jobs").iterdir())) == 4  # a process may still write
    store.database.run("UPDATE jobs SET finished = finished - 1000 WHERE finished > 0")
    os.utime(tmp_path / "jobs" / f"{2:016x}", (0, 0))
    supervisor.clear(store, tmp_path)
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [f"{3:016x}"]
    assert store.used(1) == (1, 100)
    shutil.rmtree(tmp_path / "jobs")


def test_environments_of_workers() -> None:
    def of(*arguments: object, **given: str) -> list[dict[str, str]]:
        return supervisor.environments(*arguments, given)

    assert of("cpu", 1, None) == [{}]
    assert of("cpu", 1, 2) == [{}, {}]
    assert of("gpu", 1, None) == [{}]
    visible = "CUDA_VISIBLE_DEVICES"
    assert [e[visible] for e in of("gpu", 3, None)] == ["0", "1", "2"]
    assert [e[visible] for e in of("gpu", 2, 2, **{visible: "5,7"})] == ["5", "7"]
    shared = of("gpu", 2, 3)
    assert [e[visible] for e in shared] == ["0", "1", "0"]
    assert shared[0]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert [e["TPU_VISIBLE_CHIPS"] for e in of("tpu", 4, None)] == list("0123")
