# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather

from synister_jax.base.errors import UserError
from synister_jax.tables import columns, file_formats


def column(*values: object, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_integers_survive_as_text_and_as_numbers(values: list[int]) -> None:
    for given_as in (column(*map(str, values)), column(*values, kind=pa.int64())):
        found, missing, malformed = columns.integers(given_as)
        assert found.tolist() == values
        assert not missing.any() and not malformed.any()


def test_what_is_no_integer_is_told_from_what_is_missing() -> None:
    told = ["7", " +8 ", "1.2e18", "17.0", "0x1f", "1_0", "", "NA", None, "unknown"]
    told += ["9223372036854775808", "-", "٣"]
    found, missing, malformed = columns.integers(column(*told))
    assert found[:2].tolist() == [7, 8]
    assert missing.tolist() == [False] * 6 + [True] * 4 + [False] * 3
    assert malformed.tolist() == [False] * 2 + [True] * 4 + [False] * 4 + [True] * 3


def test_floats_are_no_ids() -> None:
    found, missing, malformed = columns.integers(column(1.0, None))
    assert malformed.tolist() == [True, False] and missing.tolist() == [False, True]
    too_large = column(1, 2**64 - 1, None, kind=pa.uint64())
    found, missing, malformed = columns.integers(too_large)
    assert malformed.tolist() == [False, True, False] and found[0] == 1


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_survive_as_text(values: list[float]) -> None:
    assert columns.numbers(column(*map(repr, values))).tolist() == values
    assert columns.numbers(column(*values)).tolist() == values


def test_what_is_no_number_is_nan() -> None:
    told = ["1.", "+.5", "2E+05", "abc", "1,5", "nan", "inf", "", None, "1e999", "0x1"]
    found = columns.numbers(column(*told))
    assert found[:3].tolist() == [1, 0.5, 2e5] and np.isnan(found[3:]).all()
    assert np.isnan(columns.numbers(column(None, None))).all()


def test_text_knows_what_says_nothing() -> None:
    told = column(" ALad1", "NA", "", "unknown", "Unknown", None, "none ", "nay")
    known = columns.text(told).to_pylist()
    assert known == ["ALad1", None, None, None, None, None, None, "nay"]
    coded = column("b", "NA", "b").dictionary_encode()
    assert columns.text(coded).to_pylist() == ["b", None, "b"]


def test_formats(tmp_path: pathlib.Path) -> None:
    lines = "id,x\n720575940612345678,1.5\n2,\n"
    (tmp_path / "a.csv").write_text(lines)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(lines.encode()))
    rows = [{"id": 720575940612345678, "x": 1.5}, {"id": 2}]
    # The original's consolidated files contain JSON although their names end in .csv.
    (tmp_path / "b.csv").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    table = pa.table({"id": [720575940612345678, 2], "x": [1.5, None]})
    feather.write_feather(table, str(tmp_path / "c.feather"))
    for name in ("a.csv", "a.csv.gz", "b.csv", "b.json", "c.feather"):
        table = file_formats.read(tmp_path / name)
        ids, _, _ = columns.integers(table["id"])
        x = columns.numbers(table["x"])
        assert ids.tolist() == [720575940612345678, 2], name
        assert x[0] == 1.5 and np.isnan(x[1]), name


def test_json_of_mixed_kinds_stays_readable(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 5}, {"id": "6"}, {"id": [7]}, {"id": None}]))
    found, missing, malformed = columns.integers(file_formats.read(path)["id"])
    assert found[:2].tolist() == [5, 6]
    assert malformed.tolist() == [False, False, True, False] and missing[3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "cannot read"),
        ("a.csv", b"x,y\n1,2\n3\n", "Expected 2 columns, got 1"),
        ("a.csv", b"x,x\n1,2\n", "two columns of one name"),
        ("a.csv", b"x\n\xff\n", "cannot read"),
        ("a.json", b'{"a": 1}', "not a JSON list"),
        ("a.json", b"[1", "not valid JSON"),
        ("a.feather", b"nothing", "cannot read"),
        ("a.csv.gz", b"nothing", "cannot read"),
        ("a.xlsx", b"nothing", "cannot tell the format"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: pathlib.Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        file_formats.read(tmp_path / name)
    assert name in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        file_formats.read(tmp_path / "absent.csv")
