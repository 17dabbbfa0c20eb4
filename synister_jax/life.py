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


def is_stale(history: Sequence[float], evaluations: int) -> bool:
    """Whether the last `evaluations` values brought nothing above the best before."""
    if not evaluations or not history:
        return False
    return len(history) - 1 - int(np.argmax(history)) >= evaluations
