# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: how much is done, how fast, and how long it will take."""

import collections
import time


class Progress:
    """Prints `what: done/total, rate, ETA, note` at most every `every_seconds`.

    Silent where another process prints the same. Without a total: done and rate.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        done: int = 0,
        every_seconds: float = 5,
        silent: bool = False,
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._silent = done, silent
        self.note = ""
        self._every = every_seconds
        self._start = self._printed = time.monotonic()
        # The rate is that of the last lines: a compilation at the start, or a pause
        # for validation, does not spoil the ETA for long.
        self._recent = collections.deque([(self._start, done)], maxlen=6)

    def add(self, count: int = 1) -> None:
        """Counts `count` more units done and prints when a line is due."""
        self._done += count
        now = time.monotonic()
        finished = self._total is not None and self._done >= self._total
        if now - self._printed < self._every and not finished:
            return
        self._printed = now
        elapsed = max(now - self._start, 1e-9)
        since, done_before = self._recent[0]
        rate = (self._done - done_before) / max(now - since, 1e-9)
        self._recent.append((now, self._done))
        total = "" if self._total is None else f"/{self._total:,}"
        if finished or self._total is None:
            left = f"in {duration(elapsed)}"
        elif rate > 0:
            left = f"ETA {duration((self._total - self._done) / rate)}"
        else:
            left = "ETA unknown"
        line = (
            f"{self._what}: {self._done:,}{total} {self._unit}, {rate:,.1f}/s, {left}"
        )
        if not self._silent:
            print(f"{line}, {self.note}" if self.note else line, flush=True)


def duration(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    )
