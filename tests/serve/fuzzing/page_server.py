# SPDX-License-Identifier: Apache-2.0
"""Starts the web page's server with a real worker, for the tests in this folder."""

import contextlib
import json
import pathlib
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from synister_jax.base import files
from synister_jax.serve import tokens
from synister_jax.serve.store import Store
from tests.helpers import serving
from tests.helpers.small_data import ROOT

START_SECONDS = 180  # a worker imports JAX, restores a network and compiles it
FRAME = '  File "'  # a traceback in the log has this
DEMO_SYNAPSES = str(ROOT / "demo" / "synapses.feather")
# The same text as `make serve` writes.
_DEMO = """[demo]
title = "Demonstration"
workdir = "{demo}/run"
volume = "{demo}/data/volume.n5/volumes/raw/s0"
calibrated = true
synapses = "{demo}/synapses.feather"
"""


class PageServer(serving.Command):
    """A server that answers and whose models are ready.

    Attributes:
      tokens: The tokens, by the names given to the constructor.
      model: Name of the first model.
    """

    def __init__(
        self,
        models: pathlib.Path,
        state: pathlib.Path,
        names: Sequence[str],
        *flags: str,
    ) -> None:
        self.state = state
        state.mkdir(mode=0o700)
        store = Store(state / "service.sqlite")
        self.tokens = {name: tokens.add(store.database, name) for name in names}
        store.close()
        super().__init__(models, f"--state={state}", *flags)
        self.port = int(self.url.rpartition(":")[2])
        try:
            offered = serving.wait_for(self._ready_models, START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        self.model = offered[0]["name"]

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.process.kill()  # in case it did not stop

    def _ready_models(self) -> list[dict[str, Any]] | None:
        assert self.alive(), self.log()
        offered = self.get("/api/models")
        return offered if all(model["ready"] for model in offered) else None

    def alive(self) -> bool:
        """Returns whether the process of the page still runs."""
        return self.process.poll() is None

    def log(self) -> str:
        """Returns everything that the server and the worker have printed."""
        return "\n".join(self.output)

    def peak_rss_bytes(self) -> int:
        """Returns the peak memory of the page's process (not the worker) in bytes."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024

    def get(
        self,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        name: str | None = None,
    ) -> Any:
        """Sends a request with the token `name` (by default the first); returns JSON.

        Raises:
          urllib.error.HTTPError: the status is not 2xx.
        """
        token = self.tokens[name or next(iter(self.tokens))]
        request = urllib.request.Request(
            self.url + path,
            data=body,
            method=method,
            headers={"Authorization": f"Bearer {token}", "Content-Type": "text/csv"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def finish(self, job_id: str, seconds: float = 120) -> dict[str, Any]:
        """Waits for a job and returns it.

        Raises:
          RuntimeError: the job failed, was cancelled, or did not end in time.
        """
        until = time.monotonic() + seconds
        job = self.get(f"/api/jobs/{job_id}")
        while job["state"] in ("queued", "running") and time.monotonic() < until:
            time.sleep(0.1)
            job = self.get(f"/api/jobs/{job_id}")
        if job["state"] != "done":
            raise RuntimeError(f"job {job_id} is {job['state']}: {job.get('message')}")
        return job


def write_models(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    volume: pathlib.Path,
    synapse_table: pa.Table,
) -> pathlib.Path:
    """Writes a models.toml with one model; returns the path of its synapse table."""
    table = folder / "synapses.feather"
    files.write_feather(table, synapse_table)
    settings = {"workdir": str(workdir), "volume": str(volume), "synapses": str(table)}
    serving.write_models(folder, **settings)
    return table


@contextlib.contextmanager
def running(
    models: str | None, names: Sequence[str], *flags: str
) -> Iterator[PageServer]:
    """Runs a server. If `models` is None, it serves the demonstration."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        chosen = pathlib.Path(models).resolve() if models else root / "models"
        if not models:
            chosen.mkdir()
            content = _DEMO.format(demo=ROOT / "demo")
            (chosen / "models.toml").write_text(content)
        with PageServer(chosen, root / "state", names, *flags) as server:
            yield server
