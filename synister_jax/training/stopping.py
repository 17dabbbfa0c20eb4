# SPDX-License-Identifier: Apache-2.0
"""What ends a good run before its last step: SIGTERM, or no more progress."""

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """Notices SIGTERM, with which clusters announce that they take a machine back.

    While it is entered, the signal only sets a mark; `reached` says, in every process
    after the same step, that it is time to save and go.
    """

    def __init__(self) -> None:
        self._received = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        # With several processes JAX's own service has the signal, and agrees a step.
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._mark)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def reached(self, step: int) -> bool:
        """Whether to stop now, `step` updates being done; ask after every step."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)


class Patience:
    """Counts the evaluations since the best one, alike in every process.

    Args:
      evaluations: without a better one after which it is over; 0: never.
      history: (step, value) of the evaluations so far.
    """

    def __init__(self, evaluations: int, history: Sequence[tuple[int, float]]) -> None:
        self._evaluations = evaluations
        self._best, self._since, self.last_step = -np.inf, 0, 0
        for step, value in history:
            self.add(step, value)
        if jax.process_count() > 1:
            # A shared disk may show the log late: what the first process saw counts.
            own = np.array([self._best, self._since, self.last_step], np.float32)
            best, since, step = multihost_utils.broadcast_one_to_all(own)
            self._best, self._since, self.last_step = best, int(since), int(step)

    def add(self, step: int, value: float) -> None:
        """Counts one more evaluation; an equal one is no better."""
        self._since = 0 if np.float32(value) > self._best else self._since + 1
        self._best = max(self._best, float(np.float32(value)))
        self.last_step = step

    @property
    def is_over(self) -> bool:
        return 0 < self._evaluations <= self._since
