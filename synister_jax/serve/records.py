# SPDX-License-Identifier: Apache-2.0
"""What the store hands out."""

import dataclasses
import time
from typing import Literal

from synister_jax.ondemand.questions import Kind

State = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclasses.dataclass(frozen=True)
class StoredJob:
    """A request for predictions, and how far it is; times in seconds since 1970."""

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
    # When its stage began in this attempt, and how much was done already.
    since: float | None
    since_done: int
    number: int

    @property
    def eta_seconds(self) -> float | None:
        """By the pace of its stage so far; None where there is nothing to go by."""
        did = self.done - self.since_done
        if self.state != "running" or self.since is None or did <= 0 or not self.total:
            return None
        pace = (time.time() - self.since) / did
        return max(0.0, pace * (self.total - self.done))


@dataclasses.dataclass(frozen=True)
class NewJob:
    """A request for predictions that has been checked.

    Attributes:
      name: what the user calls it.
      size: bytes that it takes now; the worker's `Store.finish` says the rest.
      step: of the model's checkpoint; None before a worker opened it.
      request_key: the same for the same request.
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
    """A single position that somebody waits for, in the source's coordinates."""

    id: int
    model: str
    source: str
    x: float
    y: float
    z: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a worker said of a model."""

    name: str
    step: int | None
    classes: tuple[str, ...]
    ready: bool
    problem: str | None
    parameters: str | None


class Revoked(Exception):
    """The token is none any more."""


class LimitReached(Exception):
    """The token has as much as it may have; the message says of what."""
