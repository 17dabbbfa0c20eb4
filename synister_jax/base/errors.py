# SPDX-License-Identifier: Apache-2.0
"""The error that a person can mend, and what its message shows and hides."""

import re
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend; the message names it and says how."""


def redact(text: str) -> str:
    """The text without the name and password in a URI."""
    return re.sub(r"(\w+:/*)[^\s/]\S*@", r"\1…@", text)


def listed(things: Iterable[object], count: int, most: int = 5) -> str:
    """`a, b, c, d, e and 7 more`: the first things of a list too long for a line.

    Args:
      things: the first ones of the list, at least `most` of them where it has so many.
      count: how many the list has.
    """
    shown = [str(thing) for thing, _ in zip(things, range(most), strict=False)]
    more = f" and {count - most:,} more" if count > most else ""
    return ", ".join(shown) + more
