# SPDX-License-Identifier: Apache-2.0
"""The error that a person can fix, and what its message shows and hides."""

import re
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix. The message names it and says how."""


def redact(text: str) -> str:
    """Returns the text without the user names and passwords of the URIs in it."""
    return re.sub(r"(\w+:/*)[^\s/]\S*@", r"\1…@", text)


def listed(things: Iterable[object], count: int, most: int = 5) -> str:
    """Returns the first things of a long list: `a, b, c, d, e and 7 more`.

    Args:
      things: the list, or its first `most` things.
      count: how many things the list has.
      most: show at most this many.
    """
    shown = [str(thing) for thing, _ in zip(things, range(most), strict=False)]
    more = f" and {count - most:,} more" if count > most else ""
    return ", ".join(shown) + more
