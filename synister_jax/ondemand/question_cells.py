# SPDX-License-Identifier: Apache-2.0
"""Reads the cells of a request: exact ids and coordinates, or how to correct them."""

import math
import re

_LARGEST_ID = 2**63 - 1
# The quantifiers are possessive, so that long texts of digits are matched fast.
_NUMBER = re.compile(r"[+-]?([0-9]++(\.[0-9]*+)?|\.[0-9]++)([eE][+-]?[0-9]++)?")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}([,.'’_\s][0-9]{3})++([.,][0-9]*+)?")
_NAN = re.compile(r"[+-]?nan", re.IGNORECASE)
_INFINITE = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)
# Text that is copied from a browser can contain characters that have no width.
_BLANK = " \t\r\n\u00a0\u200b\u2060\ufeff"
# A spreadsheet may compute a cell that begins with one of these characters. East Asian
# versions also accept the wide forms.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def integer(text: str) -> int:
    """Returns an id from 0 to 2^63 − 1.

    Raises:
      ValueError: the text is not such an id. The message says what to do.
    """
    text = text.strip(_BLANK)
    if text.isascii() and text.isdigit():
        digits = text.lstrip("0") or "0"
        if len(digits) > 19 or int(digits) > _LARGEST_ID:
            raise ValueError(
                f"{shown(text)} is larger than the largest id, {_LARGEST_ID}; correct "
                "the id"
            )
        return int(digits)
    if not text:
        raise ValueError("the id is missing; write an id, or remove the line")
    if text[0] == "-" and text[1:].isdigit():
        why = "is negative, but no id is negative; write the digits of the id"
    elif _GROUPED.fullmatch(text):
        why = "has separators between its digits; write only the digits"
    elif _NUMBER.fullmatch(text):
        why = (
            "is not written as an id, and long ids lose digits in this notation; write "
            "all digits and nothing else"
        )
    else:
        why = "is not an id; write its digits and nothing else"
    raise ValueError(f"{shown(text)} {why}")


def neuron(text: str) -> int:
    """Returns an id as `integer` does, or -1 if the cell is empty or -1.

    Raises:
      ValueError: the text is neither. The message says what to do.
    """
    text = text.strip()
    # In tables of predictions, -1 means that the neuron is unknown.
    return -1 if text in ("", "-1") else integer(text)


def coordinate(text: str) -> float:
    """Returns a finite number, or NaN if the cell is empty or `nan`.

    Raises:
      ValueError: the text is neither. The message says what to do.
    """
    text = text.strip()
    if _NUMBER.fullmatch(text):
        value = float(text)
        if math.isfinite(value):
            return value + 0.0  # turns -0.0 into 0.0
        raise ValueError(f"{shown(text)} is too large; write a smaller number")
    if not text or _NAN.fullmatch(text):
        return math.nan
    if _INFINITE.fullmatch(text):
        why = "is not finite; write a number, or leave the cell empty"
    elif _GROUPED.fullmatch(text) or _NUMBER.fullmatch(text.replace(",", ".", 1)):
        why = (
            "is not written as a number; leave out separators between thousands, and "
            "write decimals with a point"
        )
    else:
        why = "is not a number; write a number, or leave the cell empty"
    raise ValueError(f"{shown(text)} {why}")


def like_data(text: str) -> bool:
    """Returns whether the text looks like a number and not like a column name."""
    text = text.strip()
    return text.lstrip("+-.")[:1].isdigit() or bool(_NAN.fullmatch(text))


def shown(text: str) -> str:
    """Returns the text in quotes, with escapes, cut after 40 characters."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def neutralised(text: str) -> str:
    """Returns the text as a CSV cell that no spreadsheet reads as a formula.

    A text that looks like a formula gets a leading '. Numbers are not changed.
    """
    if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text):
        return f"'{text}"
    return text
