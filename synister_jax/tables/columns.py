# SPDX-License-Identifier: Apache-2.0
"""Converts columns of foreign tables to text, integers or numbers, without loss."""

import contextlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# The sources write these texts for "not known" (synister_data, consolidate.py).
_UNKNOWN = ("", "na", "nan", "none", "null", "unknown")
_INTEGER = r"^[+-]?[0-9]{1,19}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


def text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the column as trimmed text, null for texts that mean "not known"."""
    column = pc.utf8_trim_whitespace(_decoded(column).cast(pa.string()))
    unknown = pc.is_in(pc.utf8_lower(column), value_set=pa.array(_UNKNOWN))
    return pc.if_else(unknown, pa.scalar(None, pa.string()), column)


def integers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (values, missing, malformed) of a column, each [n].

    The values are int64, and 0 if the value is missing or malformed. `missing` and
    `malformed` are bool. A text is malformed if it has other characters than digits and
    a sign: 1.2e18 and 17.0 were written by a program that stored the ids as floats, and
    floats lose digits of long ids. All values of a float column are malformed.
    """
    column = _decoded(column)
    if pa.types.is_integer(column.type):
        with contextlib.suppress(pa.ArrowInvalid):  # a uint64 value may be too large
            values = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
            return values, pc.is_null(column).to_numpy(), np.zeros(len(column), bool)
    if pa.types.is_floating(column.type):
        missing = pc.is_null(column, nan_is_null=True).to_numpy()
        return np.zeros(len(column), np.int64), missing, ~missing
    column = text(column)
    missing = pc.is_null(column).to_numpy()
    fits = pc.match_substring_regex(column, _INTEGER)
    long = pc.and_(fits, pc.greater(pc.utf8_length(column), 18))
    values = np.zeros(len(column), np.int64)
    malformed = ~pc.fill_null(fits, True).to_numpy()
    short = pc.fill_null(pc.and_not(fits, long), False)
    rows = short.to_numpy()
    digits = pc.utf8_ltrim(column.filter(short), "+")
    values[rows] = digits.cast(pa.int64()).to_numpy()
    for at in np.flatnonzero(pc.fill_null(long, False).to_numpy()):
        value = int(column[int(at)].as_py())
        if -(2**63) <= value < 2**63:
            values[at] = value
        else:
            malformed[at] = True
    return values, missing, malformed


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Returns the column as float64, [n].

    The value is NaN if it is missing, not a number or not finite.
    """
    column = _decoded(column)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values = column.cast(pa.float64(), safe=False).to_numpy()
    else:
        column = text(column)
        fits = pc.fill_null(pc.match_substring_regex(column, _NUMBER), False)
        digits = pc.utf8_ltrim(column, "+")
        digits = pc.if_else(fits, digits, pa.scalar(None, pa.string()))
        values = digits.cast(pa.float64()).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns plain values. Lists, structs and bytes become text for the messages."""
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        texts = [None if v is None else str(v) for v in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    return column
