# SPDX-License-Identifier: Apache-2.0
"""Runs the web service for tests, over TCP and with a worker that never computes."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import uvicorn
from pyarrow import feather

from synister_jax.base import files
from synister_jax.serve import app, served_models, tokens
from synister_jax.serve.records import StoredJob
from synister_jax.serve.service import Service, ServiceOptions
from synister_jax.serve.store import Store
from synister_jax.tables import predictions, synapses

CLASSES = ("gaba", "acetylcholine", "dopamine")
CSV = {"Content-Type": "text/csv"}
POSITIONS = "id,skid,x,y,z\n11,7,100,200,400\n12,7,140,240,440\n13,8,,240,440\n"


def write_models(folder: pathlib.Path, **settings: Any) -> pathlib.Path:
    """Writes a models.toml with the model `small`. Its run has only a config.json."""
    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    config = {
        "classes": CLASSES,
        "crop_shape_zyx": [4, 16, 16],
        "voxel_size_nm_zyx": [40.0, 4.0, 4.0],
    }
    (run / "config.json").write_text(json.dumps(config))
    table = {"title": "Small", "workdir": "run", "volume": "raw.n5"} | settings
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    (folder / "models.toml").write_text("\n".join(["[small]", *lines]) + "\n")
    return folder


def answer(folder: pathlib.Path) -> int:
    """Writes the files that answering.py would write, and returns the number of rows.

    The probabilities are made from the ids, without a network.
    """
    asked = feather.read_table(folder / "asked.feather", memory_map=False)
    if "position_id" in asked.column_names:
        ids, neurons = asked["position_id"], asked["neuron_id"]
        xyz = {f"{name}_nm": asked[name] for name in "xyz"}
    else:  # two synapses for each neuron
        neurons = pa.array(np.repeat(asked["neuron_id"].to_numpy(), 2))
        ids = pa.array(np.arange(len(neurons)))
        xyz = {f"{name}_nm": pa.array(np.full(len(ids), 100.0)) for name in "xyz"}
    table = synapses.conform(
        pa.table({"synapse_id": ids, "neuron_id": neurons} | xyz),
        "the request",
        answer_all=True,
    )
    positions = synapses.positions_nm_zyx(table)
    good = np.isfinite(positions).all(axis=1)
    values = np.full((len(table), len(CLASSES)), np.nan, np.float32)
    likely = table["synapse_id"].to_numpy()[good] % len(CLASSES)
    values[good] = np.eye(len(CLASSES))[likely] * 0.7 + 0.1
    status = np.where(good, "ok", "bad_position")
    made = predictions.build(table, values, status, CLASSES, {})
    files.write_feather(folder / "predictions.feather", made)
    geometry = {"voxel_size_nm_zyx": [40.0, 4.0, 4.0], "offset_nm_zyx": [0.0] * 3}
    files.write_json(folder / "predictions.json", geometry)
    files.write_text(folder / "predictions.csv", "position_id\n")
    files.write_text(folder / "report.html", "<!doctype html><title>Report</title>")
    names, counts = np.unique(status, return_counts=True)
    about = {
        "rows": len(made),
        "status": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "classes": CLASSES,
    }
    files.write_json(folder / "answer.json", about)
    return len(made)


class Worker:
    """A thread that answers jobs at once, or waits while `holds` is set."""

    def __init__(self, store: Store, folder: pathlib.Path, name: str = "w") -> None:
        self._store, self._folder, self._name = store, folder, name
        self._stopping = threading.Event()
        self.holds = threading.Event()
        self.did: list[str] = []
        self._thread = threading.Thread(target=self._run)
        store.report_model("small", 3, CLASSES, True, None, "abc")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for point in self._store.points.claim(self._name):
                result = {
                    "neurotransmitter_name": "gaba",
                    "probabilities": dict(zip(CLASSES, (0.8, 0.1, 0.1), strict=True)),
                    "status": "ok",
                }
                if point.x == -404:
                    result = {"problem": "the volume is out of reach"}
                self._store.points.answer(point.id, self._name, result)
            job = self._store.claim(self._name)
            if job is None:
                time.sleep(0.01)
            else:
                self._do(job)

    def _do(self, job: StoredJob) -> None:
        while self.holds.is_set() and not self._stopping.is_set():
            if not self._store.tell(job.id, self._name, "predicting", 1, job.rows):
                return
            time.sleep(0.01)
        if self._stopping.is_set():
            self._store.release(job.id, self._name)
            return
        rows = answer(self._folder / "jobs" / job.id)
        self.did.append(job.id)
        self._store.finish(job.id, self._name, rows, 12_345)


def client(url: str, **headers: str) -> httpx.Client:
    # The service has no https here, and reading certificates takes time.
    return httpx.Client(base_url=url, headers=headers, timeout=30, verify=False)


@dataclasses.dataclass
class Running:
    """A running service, with its store, its worker and two tokens."""

    url: str
    folder: pathlib.Path
    store: Store
    worker: Worker
    token: str
    other_token: str

    def client(self, token: str | None = None) -> httpx.Client:
        """Returns a client with this token, or with the first token."""
        return client(self.url, Authorization=f"Bearer {token or self.token}")

    def browser(self, token: str | None = None) -> httpx.Client:
        """Returns a client that is signed in by a cookie and sends the CSRF token."""
        shown = {"token": token or self.token}
        with client(self.url) as anyone:
            answered = anyone.post("/api/session", json=shown)
        assert answered.status_code == 200, answered.text
        browser = client(self.url, **{"X-CSRF-Token": answered.json()["csrf"]})
        browser.cookies = answered.cookies
        return browser


@contextlib.contextmanager
def running(folder: pathlib.Path, **options: Any) -> Iterator[Running]:
    """Runs the service in threads of this process, with two tokens."""
    write_models(folder, sources=["none", "hemibrain"], synapses="synapses.feather")
    for name in ("jobs", "uploads"):
        (folder / name).mkdir(exist_ok=True)
    store = Store(folder / "service.sqlite")
    worker = Worker(store, folder)
    found = served_models.load(folder)
    networks = {name: served_models.network(model) for name, model in found.items()}
    service = Service(
        folder, store, found, networks, ServiceOptions(**options), lambda: 1
    )
    configuration = uvicorn.Config(
        app.make(service), port=0, log_level="warning", access_log=False, ws="none"
    )
    server = uvicorn.Server(configuration)
    thread = threading.Thread(target=server.run)
    thread.start()
    worker.start()
    try:
        wait_for(lambda: server.started)
        [port] = [s.getsockname()[1] for each in server.servers for s in each.sockets]
        yield Running(
            f"http://127.0.0.1:{port}",
            folder,
            store,
            worker,
            tokens.add(store.database, "first"),
            tokens.add(store.database, "second"),
        )
    finally:
        server.should_exit = True
        worker.stop()
        thread.join()
        store.close()


def wait_for(true: Callable[[], Any], seconds: float = 30) -> Any:
    """Calls `true` until its result is true, and returns this result."""
    until = time.monotonic() + seconds
    while not (result := true()):
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)
    return result


def finished(client: httpx.Client, job_id: str, seconds: float = 60) -> dict[str, Any]:
    """Waits until the job is over, and returns the job."""
    over = ("done", "failed", "cancelled")

    def ask() -> dict[str, Any] | None:
        job = client.get(f"/api/jobs/{job_id}").json()
        return job if job["state"] in over else None

    return wait_for(ask, seconds)


class Command:
    """A process of `python -m synister_jax.serve`, as users start it.

    Attributes:
      url: the address at which the service listens.
      token: the token that the service printed, or None.
      output: the lines that the service has printed so far.
    """

    def __init__(self, models_folder: pathlib.Path, *arguments: str) -> None:
        self.output: list[str] = []
        self.token: str | None = None
        command = [
            sys.executable,
            "-m",
            "synister_jax.serve",
            "--port=0",
            "--workers=1",
        ]
        self.process = subprocess.Popen(
            [*command, f"--models={models_folder}", *arguments],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.url = wait_for(lambda: self._find(r"serving .* at (\S+)/$"))
            wait_for(self._answers)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        if found := self._find(r"#token=(\S+)"):
            self.token = found

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal, and returns the exit code of the process."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        # Workers write to the same output, and may end after the process.
        self._reader.join(30)
        return code

    def client(self, token: str | None = None) -> httpx.Client:
        return client(self.url, Authorization=f"Bearer {token or self.token}")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.output
        try:
            with client(self.url) as anyone:
                return anyone.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def _find(self, pattern: str) -> str | None:
        assert self.process.poll() is None, self.output
        found = [re.search(pattern, line) for line in list(self.output)]
        return next((match[1] for match in found if match), None)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.output.append(line.rstrip("\n"))
        self.process.stdout.close()
