# SPDX-License-Identifier: Apache-2.0
"""The error that a person can mend, and what no message may show."""

import re


class UserError(Exception):
    """A mistake that the user can mend; the message names it and says how."""


def redact(text: str) -> str:
    """The text without the name and password in a URI."""
    return re.sub(r"(\w+:/*)[^\s/]\S*@", r"\1…@", text)
