# SPDX-License-Identifier: Apache-2.0
"""The progress of long work: how much is done, how fast, and how long it will take."""

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """A bar on a terminal; elsewhere, as in a log file, a line every few seconds.

    Either shows `what: done/total unit, rate, ETA, note`. The rate is an average of the
    last lines, so that a pause does not spoil the ETA for long. The first call of `add`
    does not count for the rate: it often waits for a program to be compiled.

    Attributes:
      note: text that is shown after the ETA; it may change at any time.
    """

    monitor_interval = 0  # tqdm would start a thread of its own
    disable: bool
    start_t: float

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        done: int = 0,
        every_seconds: float = 5,
        silent: bool = False,
    ) -> None:
        """Shows nothing before the first `add`.

        Args:
          what: the name of the work.
          total: the number of units to do; None if it is not known. Then call `close`
            at the end, or use the object in a `with` statement.
          unit: the plural of what is counted, for example "synapses".
          done: the number of units that an earlier run has done.
          every_seconds: the time from one line to the next where there is no terminal.
          silent: show nothing, because another process shows the same.
        """
        self.note = ""
        self._started = time.monotonic()
        self._done_before = done
        self._has_rate = self._has_ended = False
        self._is_bar = sys.stdout.isatty()
        super().__init__(
            desc=what,
            total=total,
            unit=unit,
            initial=done,
            file=sys.stdout,
            disable=silent,
            mininterval=0.2 if self._is_bar else every_seconds,
            miniters=1,
            delay=0 if self._is_bar else 1e-9,  # 0 draws an empty bar at once
            dynamic_ncols=True,
            bar_format="{bar:20} {line}" if self._is_bar and total else "{line}",
        )

    def add(self, count: int = 1) -> None:
        """Counts `count` more units as done and shows the progress when it is time."""
        if self.disable:
            return
        if self.total is not None and self.n + count >= self.total:
            self.n += count
            self.close()
        elif self._has_rate:
            self.update(count)
        else:
            self.n += count
            now = time.time()  # the clock of tqdm
            if now - self.start_t >= self.mininterval:
                self.refresh()
            self._has_rate = True
            self.start_t = self.last_print_t = now
            self.initial = self.last_print_n = self.n

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draws the bar on a terminal; prints a line elsewhere."""
        if self._is_bar:
            super().display(msg, pos)
        else:
            print(self, file=self.fp, flush=True)

    def close(self) -> None:
        """Shows the last numbers. Later calls of `add` and `close` do nothing."""
        if self.disable:
            return
        self._has_ended = True
        self.refresh()
        if self._is_bar:
            super().close()
        self.disable = True

    def __del__(self) -> None:
        # tqdm closes here, too late for a line: the work has failed meanwhile.
        if self._is_bar:
            super().__del__()

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values that tqdm can show, with our whole line as `line`."""
        values: dict[str, Any] = super().format_dict
        return values | {"line": self._line(values)}

    def _line(self, values: dict[str, Any]) -> str:
        seconds = time.monotonic() - self._started
        total = "" if self.total is None else f"/{self.total:,}"
        parts = [f"{self.desc}: {self.n:,}{total} {self.unit}".rstrip()]
        if self._has_ended or self.total is None:
            rate = (self.n - self._done_before) / max(seconds, 1e-9)
            parts += [f"{rate:,.1f}/s", f"in {duration(seconds)}"]
        elif self._has_rate:
            since = max(values["elapsed"], 1e-9)
            rate = values["rate"] or (self.n - self.initial) / since
            parts.append(f"{rate:,.1f}/s")
            if rate:
                parts.append(f"ETA {duration((self.total - self.n) / rate)}")
        if len(parts) == 1:
            parts.append("ETA not known yet")
        return ", ".join(parts + [self.note] * bool(self.note))


def say(line: str) -> None:
    """Prints a line; on a terminal above the bars that are drawn there."""
    if sys.stdout.isatty():
        Progress.write(line)
    else:
        print(line, flush=True)


def duration(seconds: float) -> str:
    """Returns the time as m:ss, or as h:mm:ss from one hour on."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    )
