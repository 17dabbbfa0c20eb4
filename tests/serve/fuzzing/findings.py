# SPDX-License-Identifier: Apache-2.0
"""Counts the answers to malformed calls, and decides which of them are errors."""

import collections
import dataclasses
import json
import threading
from collections.abc import Mapping

_FETCH = "/fetch-neurotransmitter"
_LEAKS = (b"Traceback (most recent", b"SQLite format 3\x00", b"root:x:0:")


@dataclasses.dataclass
class Findings:
    """The counts of calls and errors, by kind of call."""

    statuses: dict[str, collections.Counter[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    slowest: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(
        self, kind: str, what: str, status: str, seconds: float, error: str | None
    ) -> None:
        """Counts one call. The text `what` says how to repeat the call."""
        with self.lock:
            self.statuses[kind][status] += 1
            if seconds > self.slowest.get(kind, (0.0, ""))[0]:
                self.slowest[kind] = (round(seconds, 2), what[:200])
            if error is not None:
                self.errors.append(f"{error}\n    {what}")

    @property
    def calls(self) -> int:
        return sum(sum(counts.values()) for counts in self.statuses.values())


def wrong(
    path: str,
    status: int,
    fields: Mapping[str, str],
    body: bytes,
    secrets: tuple[bytes, ...] = (),
    refused: bool = False,
) -> str | None:
    """Returns what is wrong with an answer, or None if the answer is right.

    Args:
      fields: The header fields, with names in lower case.
      secrets: Bytes that no answer may contain.
      refused: Whether a 2xx answer would be an error of the server.
    """
    shown = f"{status} {body[:300]!r}"
    if status >= 500:
        late = status == 503 and path.startswith(_FETCH) and "retry-after" in fields
        return None if late else shown
    if refused and 200 <= status < 300:
        return f"not refused: {shown}"
    for leak in (*_LEAKS, *secrets):
        if leak in body:
            return f"shows {leak!r}: {shown}"
    is_json = fields.get("content-type", "").startswith("application/json")
    if status >= 400 and is_json:
        try:
            detail = json.loads(body)["detail"]
        except (ValueError, KeyError, TypeError):
            return f"no detail: {shown}" if body else None  # answers to HEAD are empty
        if not isinstance(detail, str) or "\n" in detail:
            return f"detail is not one line: {shown}"
    # A 400 in plain text comes from the HTTP server below the application.
    if (status != 400 or is_json) and fields.get("x-content-type-options") != "nosniff":
        return f"no X-Content-Type-Options: {shown}"
    return None
