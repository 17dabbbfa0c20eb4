# SPDX-License-Identifier: Apache-2.0
"""Limits how often a client may send requests."""

import threading
import time
from collections.abc import Hashable

_MOST_KEYS = 100_000


class Rate:
    """A limit on the requests of each key, by the generic cell rate algorithm.

    For each key, the algorithm stores only the time at which the full burst is allowed
    again.

    Args:
      a_minute: The number of requests in a minute that a key may send in the long run.
      burst: The number of requests that a key may send at once.
    """

    def __init__(self, a_minute: int, burst: int) -> None:
        self._seconds_each = 60 / a_minute
        self._burst_seconds = burst * self._seconds_each
        self._free_at: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def wait(self, key: Hashable) -> float:
        """Counts one request of a key, if the request is allowed now.

        Returns:
          0 if the request is allowed. Otherwise the seconds until a request is allowed.
        """
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
        """Removes the keys with a full burst, or all keys if too many remain."""
        kept = {key: at for key, at in self._free_at.items() if at > now}
        self._free_at = kept if len(kept) < _MOST_KEYS else {}
