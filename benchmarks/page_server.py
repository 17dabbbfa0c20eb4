# SPDX-License-Identifier: Apache-2.0
"""The web page's server as a process on this machine, for scripts that try it out.

It computes with a real worker, keeps its state in a folder that is removed, and is
stopped whatever happens.
"""

import contextlib
import json
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from synister_jax.serve import tokens
from synister_jax.serve.store import Store

START_SECONDS = 180  # a worker imports JAX, restores a network and compiles it
FRAME = '  File "'  # of a traceback in the log
ROOT = pathlib.Path(__file__).parents[1]
# As `make serve` writes it.
_DEMO = """[demo]
title = "Demonstration"
workdir = "{demo}/run"
volume = "{demo}/data/volume.n5/volumes/raw/s0"
calibrated = true
synapses = "{demo}/synapses.feather"
"""


class Server:
    """A server that answers and whose model is ready.

    Attributes:
      url: `http://127.0.0.1:PORT`.
      tokens: by the names that were asked for.
      model: name of the first.
    """

    def __init__(
        self, models: pathlib.Path, state: pathlib.Path, names: Sequence[str]
    ) -> None:
        self._command = [sys.executable, "-m", "synister_jax.serve"]
        self._command += [f"--models={models}", f"--state={state}"]
        self.state = state
        state.mkdir(mode=0o700)
        store = Store(state / "service.sqlite")
        self.tokens = {name: tokens.add(store.database, name) for name in names}
        store.close()
        self.port = 0
        self.url = ""
        self.model = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> None:
        """Returns when a worker has its model open.

        Raises:
          RuntimeError: the server ended, or was not ready in `START_SECONDS`.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [*self._command, f"--port={self.port}", "--workers=1", *flags]
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.alive():
            with contextlib.suppress(OSError, ValueError):  # not yet
                offered = self.get("/api/models")
                if all(model["ready"] for model in offered):
                    self.model = offered[0]["name"]
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the server is not ready:\n{self.log()}")

    def stop(self) -> int | None:
        """Its exit code, negative where it had to be killed; None: it never ran."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            return self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def alive(self) -> bool:
        """Whether the process of the page runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> pathlib.Path:
        """What server and worker print."""
        return self.state.with_name("server.log")

    def log(self) -> str:
        """All that was printed until now."""
        return self.log_path.read_text(errors="replace")

    def peak_rss_bytes(self) -> int:
        """Most memory that the page's process, without the worker, ever had."""
        assert self._process is not None
        status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024

    def get(
        self,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        name: str | None = None,
    ) -> Any:
        """The JSON of an answer to the owner of a token, by default of the first.

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
        """The job when it is over.

        Raises:
          RuntimeError: it did not end well, or not in time.
        """
        until = time.monotonic() + seconds
        job: dict[str, Any] = {"state": "unknown"}
        while time.monotonic() < until:
            job = self.get(f"/api/jobs/{job_id}")
            if job["state"] not in ("queued", "running"):
                break
            time.sleep(0.1)
        if job["state"] != "done":
            raise RuntimeError(f"job {job_id} is {job['state']}: {job.get('message')}")
        return job


@contextlib.contextmanager
def running(models: str | None, names: Sequence[str], *flags: str) -> Iterator[Server]:
    """A started server, of the demonstration where `models` is None."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        chosen = pathlib.Path(models).resolve() if models else root / "models"
        if not models:
            chosen.mkdir()
            content = _DEMO.format(demo=ROOT / "demo")
            (chosen / "models.toml").write_text(content)
        server = Server(chosen, root / "state", names)
        try:
            server.start(*flags)
            yield server
        finally:
            server.stop()
