# SPDX-License-Identifier: Apache-2.0
"""How often one may ask."""

import threading
import time
from collections.abc import Hashable

_MOST_KEYS = 100_000


class Rate:
    """So many a minute for each key, and a burst of some of them at once.

    The generic cell rate algorithm: of each key only the time is kept at which it has
    all its requests again.
    """

    def __init__(self, a_minute: int, burst: int) -> None:
        self._seconds_each = 60 / a_minute
        self._burst_seconds = burst * self._seconds_each
        self._free_at: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def wait(self, key: Hashable) -> float:
        """Counts one more; seconds until there may be one, 0 where there may now."""
        now = time.monotonic()
        with self._lock:
            if len(self._free_at) >= _MOST_KEYS:
                self._forget(now)
            free_at = max(now, self._free_at.get(key, now)) + self._seconds_each
            if free_at - now > self._burst_seconds + 1e-9:
                return free_at - now - self._burst_seconds
            self._free_at[key] = free_at
            return 0.0

    def _forget(self, now: float) -> None:
        """Keys that have all their requests, or, of too many, all."""
        kept = {key: at for key, at in self._free_at.items() if at > now}
        self._free_at = kept if len(kept) < _MOST_KEYS else {}
