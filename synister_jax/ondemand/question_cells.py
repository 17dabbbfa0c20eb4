# SPDX-License-Identifier: Apache-2.0
"""Cells of a request: ids and coordinates exactly, or what to do about them."""

import math
import re

_LARGEST_ID = 2**63 - 1
# Possessive: no length of digits makes them slow.
_NUMBER = re.compile(r"[+-]?([0-9]++(\.[0-9]*+)?|\.[0-9]++)([eE][+-]?[0-9]++)?")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}([,.'’_\s][0-9]{3})++([.,][0-9]*+)?")
_NAN = re.compile(r"[+-]?nan", re.IGNORECASE)
_INFINITE = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)
# What copying from a browser brings along has no width.
_BLANK = " \t\r\n\u00a0\u200b\u2060\ufeff"
# A spreadsheet may compute a cell that begins so; the wide forms in East Asia.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def integer(text: str) -> int:
    """An id, 0 to 2^63 − 1.

    Raises:
      ValueError: it is none; the message says what to do.
    """
    text = text.strip(_BLANK)
    if text.isascii() and text.isdigit():
        digits = text.lstrip("0") or "0"
        if len(digits) > 19 or int(digits) > _LARGEST_ID:
            raise ValueError(
                f"{shown(text)} is larger than any id, {_LARGEST_ID}; mend it"
            )
        return int(digits)
    if not text:
        raise ValueError("there is no id; write one, or remove the line")
    if text[0] == "-" and text[1:].isdigit():
        why = "is negative, as no id is; write the id's digits"
    elif _GROUPED.fullmatch(text):
        why = "has separators between its digits; write the digits alone"
    elif _NUMBER.fullmatch(text):
        why = (
            "is not written as an id, and digits of long ones are lost so; write all "
            "digits and nothing else"
        )
    else:
        why = "is not an id; write its digits and nothing else"
    raise ValueError(f"{shown(text)} {why}")


def neuron(text: str) -> int:
    """An id as `integer`, -1 where there is none."""
    text = text.strip()
    # In tables of predictions -1 stands for none.
    return -1 if text in ("", "-1") else integer(text)


def coordinate(text: str) -> float:
    """A finite number, NaN for an empty cell or one that says nan.

    Raises:
      ValueError: it is neither; the message says what to do.
    """
    text = text.strip()
    if _NUMBER.fullmatch(text):
        value = float(text)
        if math.isfinite(value):
            return value + 0.0  # not -0.0
        raise ValueError(f"{shown(text)} is too large; write a coordinate")
    if not text or _NAN.fullmatch(text):
        return math.nan
    if _INFINITE.fullmatch(text):
        why = "is not finite; write a number, or leave the cell empty"
    elif _GROUPED.fullmatch(text) or _NUMBER.fullmatch(text.replace(",", ".", 1)):
        why = (
            "is not a number as it is written; leave out separators of thousands, and "
            "write decimals with a point"
        )
    else:
        why = "is not a number; write one, or leave the cell empty"
    raise ValueError(f"{shown(text)} {why}")


def like_data(text: str) -> bool:
    """Whether it is meant for a number, not for the name of a column."""
    text = text.strip()
    return text.lstrip("+-.")[:1].isdigit() or bool(_NAN.fullmatch(text))


def shown(text: str) -> str:
    """The text in quotes, what cannot be seen spelled out, and not too long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def neutralised(text: str) -> str:
    """The text as a CSV cell that no spreadsheet takes for a formula.

    Where one might, there is a leading '; numbers stay as they are.
    """
    if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text):
        return f"'{text}"
    return text
