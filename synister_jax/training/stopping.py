# SPDX-License-Identifier: Apache-2.0
"""What ends a run before its last step: the signal SIGTERM, or no more progress."""

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """Notices SIGTERM, with which a cluster announces that it takes a machine back.

    Inside the `with` block, the signal does not end the process. `reached` returns True
    in every process after the same step: then it is time to save and leave.
    """

    def __init__(self) -> None:
        self._received = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        # With several processes, a service of JAX gets the signal and chooses a step.
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
        """Returns whether to stop after `step` updates. Call it after every step."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)


class Patience:
    """Counts the evaluations since the best one. All processes count the same.

    Args:
      evaluations: patience is over after this many evaluations without a better one; 0
        means that it is never over.
      history: (step, value) of the evaluations so far.
    """

    def __init__(self, evaluations: int, history: Sequence[tuple[int, float]]) -> None:
        self._evaluations = evaluations
        self._best, self._since, self.last_step = -np.inf, 0, 0
        for step, value in history:
            self.add(step, value)
        if jax.process_count() > 1:
            # A shared disk may show the log late to some processes, so that the first
            # process decides.
            own = np.array([self._best, self._since, self.last_step], np.float32)
            best, since, step = multihost_utils.broadcast_one_to_all(own)
            self._best, self._since, self.last_step = best, int(since), int(step)

    def add(self, step: int, value: float) -> None:
        """Counts one more evaluation. An equal value is not better."""
        self._since = 0 if np.float32(value) > self._best else self._since + 1
        self._best = max(self._best, float(np.float32(value)))
        self.last_step = step

    @property
    def is_over(self) -> bool:
        return 0 < self._evaluations <= self._since
