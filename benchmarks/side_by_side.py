# SPDX-License-Identifier: Apache-2.0
"""Two ways to do one thing, timed in turns; what the benchmarks share.

A machine's speed drifts, so the sides alternate, in an order that rotates round by
round, and what is compared are rates of one round. A side that needs an environment of
its own (an allocator's, another interpreter's) is a `Child`: a process that is idle
until it is its turn. The module itself needs nothing that is not in Python.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# By default glibc gives a large block back to the kernel when it is freed, and each new
# one costs a fault for every 4 KB. "huge": glibc asks the kernel for pages of 2 MB
# (glibc 2.35 or later; the kernel's transparent_hugepage at "madvise" or "always").
ALLOCATORS = {
    "default": {},
    "huge": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}

# Processes share a GPU here: none may take its memory in advance.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def alternate(
    sides: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Rates of every side in every round, after a round that does not count.

    Args:
      sides: by name, what does one round and returns its rate (items a second).
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for index, name in in_turns(list(sides), rounds):
        rate = sides[name]()
        note = f"{index} {name} {rate:.4g}/s" + " (warm-up)" * (index < 0)
        print(note, file=sys.stderr, flush=True)
        if index >= 0:
            rates[name].append(rate)
    return rates


def in_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name) of all rounds, and before them of one to warm up, -1.

    The side that begins a round ends the next one, so each comes in every place and,
    of three or more, none runs twice in a row. Of two, each begins every other round:
    they would keep their places else.
    """
    for index in range(-1, rounds):
        turn = index % len(names)
        for name in [*names[turn:], *names[:turn]]:
            yield index, name


def summary(rates: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    """Medians, all rounds, and `ours` over each other side.

    Of the ratios in one round the median, and the smallest and the largest.
    """
    paired = {
        other: [a / b for a, b in zip(rates[ours], values, strict=True)]
        for other, values in rates.items()
        if other != ours
    }
    return {
        "rates": {name: statistics.median(values) for name, values in rates.items()},
        "rounds": dict(rates),
        "ratio": {other: statistics.median(found) for other, found in paired.items()},
        "ratio_range": {o: [min(found), max(found)] for o, found in paired.items()},
    }


def about(*packages: str) -> dict[str, Any]:
    """The device, the machine, and versions; None of a package that is not there."""
    import jax  # a child in another environment has none

    found = {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
    }
    for package in packages:
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# ---------------------------------------------------- sides in processes of their own


class Child:
    """A process that answers requests, one at a time, and else waits on its stdin.

    Args:
      command: starts a Python script that calls `serve`, see `own_command`.
      environment: added to this process's.

    The constructor returns when the child is ready.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = list(command)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(environment or {}),
        )
        self._answer()

    def ask(self, request: str) -> Any:
        """What the child's function of that name returns."""
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._answer()

    def round(self) -> float:
        """A side for `alternate`."""
        return self.ask("round")

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"ended with {code}: {' '.join(self._command)}")
        return json.loads(line)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()  # serve ends
        if error[0] is not None:
            self._process.terminate()
        self._process.wait()
        self._process.stdout.close()


def compare(children: Mapping[str, Child], rounds: int, ours: str) -> dict[str, Any]:
    """`alternate` and `summary`; peak memory, and page faults in the rounds (all)."""
    before = {name: child.ask("usage") for name, child in children.items()}
    sides = {name: child.round for name, child in children.items()}
    found = summary(alternate(sides, rounds), ours)
    after = {name: child.ask("usage") for name, child in children.items()}
    found["peak_gb"] = {name: usage["peak_gb"] for name, usage in after.items()}
    found["page_faults"] = {
        name: usage["page_faults"] - before[name]["page_faults"]
        for name, usage in after.items()
    }
    return found


def own_command(*flags: str) -> list[str]:
    """The running script with its own flags, and these after them."""
    return [sys.executable, *sys.argv, *flags]


def serve(functions: Mapping[str, Callable[[], Any]]) -> None:
    """In a child: says that it is ready, then answers until its stdin is closed.

    Args:
      functions: by the name of the request; what they return is sent as JSON.
    """
    answers = dict(functions) | {"usage": _usage}
    # Whatever a library prints must not get between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        print(json.dumps("ready"), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answers[line.strip()]()), file=out, flush=True)


def _usage() -> dict[str, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"peak_gb": used.ru_maxrss * 1024 / 1e9, "page_faults": used.ru_minflt}
