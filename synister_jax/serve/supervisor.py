# SPDX-License-Identifier: Apache-2.0
"""Keeps the workers going, gives back what dead ones had, and clears up.

A worker's standard input is a pipe that only this process holds, so however the server
ends, its workers learn of it. They hold the server's mark in the state folder, too: the
next server waits until the last of them has gone, and no answer has two writers.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from synister_jax.base.errors import UserError
from synister_jax.serve.store import Store

_TICK_SECONDS = 0.2
_CLEAR_SECONDS = 60.0
_STOP_SECONDS = 10.0
_LEAVE_SECONDS = 60.0
# A worker that lived so long did not die of what killed the one before it.
_HEALTHY_SECONDS = 300.0
_PAUSES = (0.5, 2.0, 5.0, 15.0, 60.0)
# What a job left that came to nothing goes after this; its worker may still write.
_KEPT_SECONDS = 300.0
_PROBE = "import jax; print(jax.default_backend(), jax.local_device_count())"


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[int]:
    """Waits for the workers of a server that was killed; yields the mark they hold.

    Raises:
      UserError: they do not leave.
    """
    with (folder / ".workers").open("a") as file:
        until = time.monotonic() + _LEAVE_SECONDS
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"workers of an earlier server are still at work in {folder}; "
                        "end them (synister_jax.serve.worker) and start again"
                    ) from None
            except OSError:
                break  # a file system without locks
            if not told:
                print("waiting for the workers of an earlier server", flush=True)
                told = True
            time.sleep(_TICK_SECONDS)
        yield file.fileno()


def accelerators() -> tuple[str, int]:
    """(backend, how many) of this machine, as a process of its own sees them.

    Here JAX is not imported: it would take the accelerators.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    words = done.stdout.split()
    return (words[-2], int(words[-1])) if len(words) >= 2 else ("cpu", 1)


def environments(
    backend: str, devices: int, workers: int | None, given: Mapping[str, str]
) -> list[dict[str, str]]:
    """Of each worker, what its environment has besides ours: an accelerator each.

    Args:
      workers: one an accelerator where it is None; more than these share them.
    """
    if backend not in ("gpu", "tpu"):
        return [{}] * (workers or 1)
    workers = workers or devices
    each: list[dict[str, str]]
    if devices == 1:
        each = [{}] * workers
    elif backend == "gpu":
        names = given.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(names) < devices:
            names = [str(number) for number in range(devices)]
        each = [{"CUDA_VISIBLE_DEVICES": names[n % devices]} for n in range(workers)]
    else:
        one = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        each = [{"TPU_VISIBLE_CHIPS": str(n % devices)} | one for n in range(workers)]
    # The first of several on one accelerator would take nearly all its memory.
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if workers > devices else {}
    return [one | share for one in each]


@dataclasses.dataclass
class _Place:
    """Where a worker is, or will be again."""

    environment: dict[str, str]
    name: str = ""
    process: subprocess.Popen | None = None
    started: float = 0.0
    deaths: int = 0
    next_start: float = 0.0

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """Workers of one server.

    Args:
      arguments: of the worker's command, besides --name.
      mark: open file that the workers hold (`alone`).
    """

    def __init__(
        self,
        store: Store,
        folder: pathlib.Path,
        arguments: Sequence[str],
        workers: int | None,
        mark: int,
        module: str = "synister_jax.serve.worker",
    ) -> None:
        self._store, self._folder, self._mark = store, folder, mark
        self._command = [sys.executable, "-m", module, *arguments]
        self._workers = workers
        self._places: list[_Place] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor")

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> int:
        """How many workers there are at the moment."""
        return sum(place.is_alive for place in self._places)

    def stop(self) -> None:
        """Ends the workers; what they were doing goes on at the next start."""
        self._stopping.set()
        self._thread.join()
        until = time.monotonic() + _STOP_SECONDS
        running = [p.process for p in self._places if p.process is not None]
        for process in running:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None  # `_start` gives it a pipe
                process.stdin.close()
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._store.start_over()

    def _run(self) -> None:
        backend, devices = accelerators()
        self._places = [
            _Place(environment)
            for environment in environments(backend, devices, self._workers, os.environ)
        ]
        cleared = 0.0
        while not self._stopping.is_set():
            try:
                self._tick()
                if time.monotonic() - cleared > _CLEAR_SECONDS:
                    cleared = time.monotonic()
                    clear(self._store, self._folder)
            except Exception as error:  # a full disk, say: it may have room again
                print(f"supervisor: {type(error).__name__}: {error}", file=sys.stderr)
            self._stopping.wait(_TICK_SECONDS)

    def _tick(self) -> None:
        now = time.monotonic()
        for place in self._places:
            if place.is_alive:
                continue
            if place.process is not None:
                self._bury(place, place.process, now)
            if now >= place.next_start:
                self._start(place, now)

    def _bury(self, place: _Place, process: subprocess.Popen, now: float) -> None:
        code = process.returncode
        assert process.stdin is not None  # `_start` gives it a pipe
        process.stdin.close()
        place.process = None
        place.deaths = 0 if now - place.started > _HEALTHY_SECONDS else place.deaths
        pause = _PAUSES[min(place.deaths, len(_PAUSES) - 1)]
        place.deaths += 1
        place.next_start = now + pause
        names = [other.name for other in self._places if other.is_alive]
        lost = self._store.requeue_lost(names)
        print(
            f"worker {place.name} ended ({code}), {lost} jobs go back; another starts "
            f"in {pause:g} s",
            file=sys.stderr,
            flush=True,
        )

    def _start(self, place: _Place, now: float) -> None:
        # A name of its own: a worker is not taken for the one before it.
        place.name = f"{self._places.index(place)}-{secrets.token_hex(4)}"
        place.process = subprocess.Popen(
            [*self._command, f"--name={place.name}"],
            stdin=subprocess.PIPE,
            env=os.environ | place.environment,
            pass_fds=[self._mark],
            # Ctrl-C is for the server, which then ends them.
            start_new_session=True,
        )
        place.started = now


def clear(store: Store, folder: pathlib.Path) -> None:
    """Removes folders without a job, what came to nothing, and old points."""
    states, now = store.states(), time.time()
    for path in (folder / "jobs").iterdir():
        state, finished = states.get(path.name, ("deleted", path.stat().st_mtime))
        if state not in ("deleted", "failed", "cancelled"):
            continue
        assert finished is not None  # the store writes when it came to nothing
        if now - finished > _KEPT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
            store.emptied(path.name)
    store.forget_points()
