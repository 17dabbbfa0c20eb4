# SPDX-License-Identifier: Apache-2.0
"""The records that the store returns, and its exceptions."""

import dataclasses
import time
from typing import Literal

from synister_jax.ondemand.questions import Kind

State = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclasses.dataclass(frozen=True)
class StoredJob:
    """A request for predictions and its progress; times are in seconds since 1970.

    Attributes:
      stage: What the worker does now; empty if the job is not running.
      done: The units of the stage that are done, of `total`.
      rows: The rows of the request. After the end, the rows of the answer.
      message: The reason why the job failed.
      attempts: The number of workers that began the job.
      view_key: The key in the addresses that Neuroglancer reads.
      request_key: The key that is equal for equal requests.
      bytes: The size of the request, or of the answer folder after the end.
      step: The step of the model's checkpoint, or None if it was not known.
      since: The time when the current stage began in this attempt.
      since_done: The units that were done at that time.
      number: The place of the job in the queue.
    """

    id: str
    token_id: int
    model: str
    source: str
    kind: Kind
    name: str
    state: State
    stage: str
    done: int
    total: int
    rows: int
    message: str | None
    created: float
    started: float | None
    finished: float | None
    worker: str | None
    attempts: int
    view_key: str
    request_key: str | None
    bytes: int
    step: int | None
    since: float | None
    since_done: int
    number: int

    @property
    def eta_seconds(self) -> float | None:
        """The remaining seconds of the stage, from its pace so far.

        None if the job is not running, or if no unit is done yet.
        """
        did = self.done - self.since_done
        if self.state != "running" or self.since is None or did <= 0 or not self.total:
            return None
        pace = (time.time() - self.since) / did
        return max(0.0, pace * (self.total - self.done))


@dataclasses.dataclass(frozen=True)
class NewJob:
    """A request for predictions that has been checked.

    Attributes:
      name: The name that the user gives to the job.
      size: The bytes that the request takes. `Store.finish` writes the size of the
        answer later.
      step: The step of the model's checkpoint, or None if no worker has opened it.
      request_key: The key that is equal for equal requests.
    """

    id: str
    token_id: int
    model: str
    source: str
    kind: Kind
    name: str
    rows: int
    size: int
    step: int | None
    request_key: str


@dataclasses.dataclass(frozen=True)
class StoredPoint:
    """A single position that a user waits for, in the coordinates of the source."""

    id: int
    model: str
    source: str
    x: float
    y: float
    z: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a worker on a model; see `Store.report_model`."""

    name: str
    step: int | None
    classes: tuple[str, ...]
    ready: bool
    problem: str | None
    parameters: str | None


class Revoked(Exception):
    """The token is revoked."""


class LimitReached(Exception):
    """The token has reached a limit; the message names the limit."""
