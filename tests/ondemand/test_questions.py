# SPDX-License-Identifier: Apache-2.0
import csv
import io
import math
import pathlib
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from synister_jax.base.errors import UserError
from synister_jax.ondemand import question_lines, questions
from synister_jax.ondemand.questions import Checked, LineProblem

NEURON = 720_575_940_600_000_001  # a float64 cannot hold this id
LARGEST = 2**63 - 1


def _check(text: str | bytes, **options: object) -> Checked:
    raw = text.encode() if isinstance(text, str) else text
    return questions.check(io.BytesIO(raw), **options)


def _asked(text: str | bytes, **options: object) -> dict[str, list]:
    checked = _check(text, **options)
    assert checked.errors == []
    table = checked.asked.table
    schema = {"neurons": questions.NEURONS, "positions": questions.POSITIONS}
    assert table.schema == schema[checked.asked.kind]
    assert checked.asked.kind == checked.kind
    return table.to_pydict()


def _positions(*rows: tuple[int, int | None, float, float, float]) -> dict[str, list]:
    return {
        name: list(values)
        for name, values in zip(
            questions.POSITIONS.names, zip(*rows, strict=True), strict=True
        )
    }


def _errors(text: str | bytes, **options: object) -> list[tuple[int, str, str]]:
    checked = _check(text, **options)
    assert checked.asked is None
    assert checked.error_count >= len(checked.errors) > 0
    return [(each.line, each.column, each.message) for each in checked.errors]


@pytest.mark.parametrize(
    "name", [*questions.NEURON, "  Skeleton ID ", "BodyId", "Skid"]
)
def test_neurons_under_any_name(name: str) -> None:
    text = f"comment,{name}\na,7\n,{NEURON}\nb,{LARGEST}\n"
    assert _asked(text) == {"neuron_id": [7, NEURON, LARGEST]}
    assert _asked(text, kind="neurons") == {"neuron_id": [7, NEURON, LARGEST]}


@pytest.mark.parametrize("name", [*questions.ID, "Connector ID"])
def test_positions_under_any_name(name: str) -> None:
    text = f"Z ,Y,{name}, X,Skid\n1,2.5,{NEURON},-3,16\n4,5,{NEURON},6,\n7,8,0,9,-1\n"
    assert _asked(text) == _positions(
        (NEURON, 16, -3, 2.5, 1), (NEURON, None, 6, 5, 4), (0, None, 9, 8, 7)
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
def test_positions_without_a_header(delimiter: str, end: str) -> None:
    def text(*rows: str) -> str:
        return "".join(row.replace(",", delimiter) + end for row in rows)

    assert _asked(text("1,2,3.5", "", "+4,5e1,.5")) == _positions(
        (1, None, 1, 2, 3.5), (2, None, 4, 50, 0.5)
    )
    assert _asked(text("9,1,2,3")) == _positions((9, None, 1, 2, 3))
    assert _asked(text("9,16,1,2,3")) == _positions((9, 16, 1, 2, 3))
    [said] = _check(text("9,16,1,2,3")).warnings
    assert "the columns are id, skid, x, y, z" in said.message
    assert _check(text("9,16,1,2,3"), kind="positions").warnings == []
    assert _asked(text("9,16,1", "5"), kind="neurons") == {"neuron_id": [9, 16, 1, 5]}


def test_neurons_without_a_header() -> None:
    text = f"16\n\n {NEURON} 5\n7,8;9\t10, 11\n"
    ids = [16, NEURON, 5, 7, 8, 9, 10, 11]
    assert _asked(text) == {"neuron_id": ids}
    assert _check(text).rows == 8
    assert _asked("1,2") == {"neuron_id": [1, 2]}
    assert _asked("6 5 4 3 2 1") == {"neuron_id": [6, 5, 4, 3, 2, 1]}


def test_neurons_again_are_said_once() -> None:
    checked = _check("skid\n5\n3\n5\n5\n4\n3\n")
    assert checked.asked.table["neuron_id"].to_pylist() == [5, 3, 4]
    assert (checked.rows, checked.warning_count) == (6, 1)
    assert str(checked.warnings[0]).startswith("3 ids are repeated; each")


def test_positions_again_are_kept() -> None:
    assert len(_asked("id,x,y,z\n5,1,2,3\n5,1,2,3\n")["x"]) == 2


def test_empty_coordinates_are_answered_too() -> None:
    text = "id,x,y,z,note\n1,,2,3,\n2,nan,NaN,-NAN,\n,,,,\n3, ,2,3,a\n"
    checked = _check(text)
    np.testing.assert_array_equal(
        checked.asked.table["x"].to_numpy(), [math.nan, math.nan, math.nan]
    )
    assert checked.asked.table["position_id"].to_pylist() == [1, 2, 3]
    assert list(map(str, checked.warnings)) == [
        "line 2: x is empty; the answer has the status bad_position",
        "line 3: x, y, z are empty; the answer has the status bad_position",
        "line 4: the row is empty; it is left out",
        "line 5: x is empty; the answer has the status bad_position",
    ]


def test_without_ids_no_row_is_left_out() -> None:
    assert _asked("x,y,z\n1,2,3\n,,\n\n4,5,6\n")["position_id"] == [1, 2, 3]


def test_minus_zero_is_zero() -> None:
    [x] = _asked("x,y,z\n-0.0,0,0")["x"]
    assert math.copysign(1, x) == 1


def test_cells_may_be_quoted_and_hold_line_breaks() -> None:
    text = b'\xef\xbb\xbf"skid","note, long"\r\n"16","a\r\nb ""c"""\r\n\n17,d\n1x,\n'
    assert _errors(text)[0][:2] == (6, "skid")
    assert _asked(text.replace(b"1x", b"18")) == {"neuron_id": [16, 17, 18]}


def test_empty_cells_beyond_the_header_do_not_count() -> None:
    assert _asked("skid,\n16,,,\n17,\n") == {"neuron_id": [16, 17]}
    assert _errors("skid,a\n16\n17,b,,c\n") == [
        (2, "", _errors("skid,a\n16\n")[0][2]),
        (3, "", _errors("skid,a\n\n17,b,,c\n")[0][2]),
    ]
    said = _errors("skid,a\n1,b,,c")[0][2]
    assert "the row has 4 cells, but the first line has 2" in said


BAD_IDS = {
    "1e5": "long ids lose digits",
    "16.0": "long ids lose digits",
    '"1,234"': "separators between its digits",
    '"1 234"': "separators between its digits",
    "1_000": "separators between its digits",
    "+5": "not written as an id",
    "-5": "negative",
    "0x1f": "not an id",
    "１２": "not an id",
    "²": "not an id",
    "١٢": "not an id",
    "abc": "not an id",
    "=1+1": "not an id",
    "inf": "not an id",
    "nan": "not an id",
    str(LARGEST + 1): "larger than the largest id",
    "9" * 5000: "larger than the largest id",
    "": "the id is missing",
}


@pytest.mark.parametrize("text", BAD_IDS)
def test_what_is_no_id(text: str) -> None:
    for table in (f"id,x,y,z\n1,2,3,4\n{text},5,6,7\n", f"skid,a\n1,\n{text},b\n"):
        [(line, column, message)] = _errors(table)
        assert (line, column) == (3, table.partition(",")[0])
        assert BAD_IDS[text] in message
        assert len(message) < 200
        assert message.isprintable()


BAD_COORDINATES = {
    "abc": "not a number; write a number, or leave the cell empty",
    "0x1f": "not a number",
    "NA": "not a number",
    "１２": "not a number",
    "\u202e1": "not a number",
    "1.2.3": "not a number",
    "1e": "not a number",
    "+-1": "not a number",
    ".": "not a number",
    "--": "not a number",
    "inf": "not finite",
    "-Infinity": "not finite",
    "+INF": "not finite",
    "1e999": "too large",
    '"1,234"': "leave out separators",
    '"1,234,567.5"': "leave out separators",
    '"1,5"': "decimals with a point",
    "1_000": "leave out separators",
    "1 000": "leave out separators",
    "1'000": "leave out separators",
}


@pytest.mark.parametrize("text", BAD_COORDINATES)
def test_what_is_no_coordinate(text: str) -> None:
    [(line, column, message)] = _errors(f"x,Y,z\n1,{text},3\n")
    assert (line, column) == (2, "Y")
    assert BAD_COORDINATES[text] in message
    assert message.isprintable()


def test_each_wrong_cell_of_a_row_is_said() -> None:
    errors = _errors("x,y,z,id,skid\na,b,3,c,-2\n1,,2,3,-1\n")
    assert [(line, column) for line, column, _ in errors] == [
        (2, column) for column in ("id", "skid", "x", "y")
    ]
    problem = _check("x,y,z\na,1,2").errors[0]
    assert str(problem) == (
        "line 2, column x: 'a' is not a number; write a number, or leave the cell empty"
    )


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 0, "nothing in it"),
        ("\ufeff\n \r\n\t\n", 0, "nothing in it"),
        ("\nskid\n\n", 0, "no row after the header"),
        ("id,x,y,z\n,,,\n", 0, "no row after the header"),
        ("\nname,class\na,b\n", 2, "the line names no known column"),
        ("id,name\n1,b\n", 1, "names neither neurons (skid, "),
        ("id,x,z\n1,2,3\n", 1, "no column y"),
        ("x,y,z,X\n1,2,3,4\n", 1, "columns 'x' and 'X' have the same meaning"),
        ("skid,root_id\n1,2\n", 1, "columns 'skid' and 'root_id' have"),
        ("id,synapse_id,x,y,z\n1,1,1,1,1\n", 1, "'id' and 'synapse_id' have"),
        ("1,2,3,\n", 1, "ends with an empty cell"),
        ("\n\nab\0c\n", 3, "NUL"),
        ("skid\n1\n\0\n", 3, "NUL"),
        ("skid\n1\n".encode("utf-16"), 1, "UTF-16"),
        ("skid\n1\n".encode("utf-16-be"), 1, "NUL"),
        (b"skid,n\n1,\xe9\n", 2, "UTF-8"),
        (b"sk\xefd,skid\n1,2\n", 1, "UTF-8"),
        ('skid\n5\n"6"7\n8\n', 3, "quotation mark"),
        ('skid,n\n5,\n6,"a\nb\n', 3, "quotation mark is not closed"),
        ('"skid\n5\n', 1, "quotation mark"),
        ('skid\n5\n"6' + "\n7" * 50_000, 3, "quotation mark is opened and not closed"),
        ("skid\n5\n" + "6 " * 40_000, 3, "longer than 65,536 bytes"),
        ("7" * 1_000_000, 1, "longer than 65,536 bytes"),
    ],
)
def test_what_cannot_be_read(text: str | bytes, line: int, said: str) -> None:
    errors = _errors(text)
    assert errors[0][:2] == (line, "")
    assert said in errors[0][2]


def test_another_kind_than_asked_for() -> None:
    for text, kind, said in (
        ("skid\n1", "positions", "ask for neurons, or"),
        ("1\n2", "positions", "has 1 cell; a position is x, y, z, or id, x, y, z, or"),
        ("id,skid,x,y,z\n1,2,3,4,5", "neurons", "ask for positions, or"),
        ("1.5,2,3", "neurons", "not written as an id"),
    ):
        assert said in _errors(text, kind=kind)[0][2]
        assert _check(text).asked is not None


@pytest.mark.parametrize("kind", ["skid\n", "", "x,y,z\n"])
def test_no_more_rows_than_allowed(kind: str) -> None:
    row = "1,2,3\n" if kind == "x,y,z\n" else "1\n"
    assert _check(kind + row * 5, most_rows=5).rows == 5
    checked = _check(kind + row * 50 + "bad\n", most_rows=5)
    assert checked.rows == 5
    assert checked.asked is None
    line = 6 + bool(kind)
    why = "there are more than 5 rows; split the request"
    assert checked.errors == [LineProblem(line, "", why)]


def test_blank_lines_are_bounded_too() -> None:
    [(line, _, said)] = _errors("skid\n" + "\n" * 20_000, most_rows=5)
    assert (line, said[:35]) == (10_001, "the text has more than 10,000 lines")


def test_the_first_problems_are_kept_and_all_counted() -> None:
    checked = _check("x,y,z\n" + "a,b,c\n" * 70 + ",1,2\n" * 150)
    most = question_lines.MOST_TOLD
    assert (len(checked.errors), checked.error_count) == (most, 210)
    assert (len(checked.warnings), checked.warning_count) == (most, 150)
    assert checked.errors[-1].line == 35


class _Slow(io.BytesIO):
    """A file that returns at most three bytes per read."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(3)


@given(
    st.lists(
        st.tuples(st.integers(1, 99), st.sampled_from(["\n", "\r\n", "\r"])), min_size=1
    )
)
def test_pieces_do_not_matter(lines: list[tuple[int, str]]) -> None:
    raw = "".join(f"{number}{end}" for number, end in lines).encode() + b"x"
    checked = questions.check(_Slow(raw))
    assert checked == _check(raw)
    assert checked.errors[0].line == len(lines) + 1


_ID = st.integers(0, LARGEST)
_NUMBER = st.floats(-1e15, 1e15) | st.just(math.nan)
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=10)


@pytest.mark.long
@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(_ID, st.none() | _ID, _NUMBER, _NUMBER, _NUMBER, _TEXT), min_size=1
    ),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    names=st.tuples(st.sampled_from(questions.ID), st.sampled_from(questions.NEURON)),
    order=st.permutations(range(6)),
    header=st.booleans(),
    bom=st.booleans(),
)
def test_tables_come_through(
    rows: list[tuple],
    delimiter: str,
    end: str,
    names: tuple[str, str],
    order: list[int],
    header: bool,
    bom: bool,
) -> None:
    given_rows = [list(row) for row in rows]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    if header:
        columns = [*names, "x", "y", "z", "note"]
        writer.writerow([columns[place] for place in order])
        writer.writerows([row[place] for place in order] for row in given_rows)
    else:
        # Without a header, the last cell of the first line must not be empty.
        given_rows[0][4] = 1.0
        writer.writerows(row[:5] for row in given_rows)
    raw = ("\ufeff" if bom else "").encode() + text.getvalue().encode()
    checked = _check(raw, kind="positions")
    assert checked.errors == []
    table = checked.asked.table
    assert table["position_id"].to_pylist() == [row[0] for row in given_rows]
    assert table["neuron_id"].to_pylist() == [row[1] for row in given_rows]
    for place, axis in enumerate("xyz", 2):
        expected = [row[place] for row in given_rows]
        np.testing.assert_array_equal(table[axis].to_numpy(), expected)
    missing = [any(map(math.isnan, row[2:5])) for row in given_rows]
    assert checked.warning_count == sum(missing)


@settings(deadline=None)
@given(
    good=st.lists(
        st.tuples(_ID, st.sampled_from(["", "\n", '"a\r\nb"', '"a\n\n"'])), min_size=1
    ),
    bad=st.dictionaries(st.integers(0, 20), st.sampled_from(["", "1.5", "x", "-1"])),
)
def test_errors_are_where_they_were_put(
    good: list[tuple[int, str]], bad: dict[int, str]
) -> None:
    """Errors have the right line, also after blank lines and cells with line breaks."""
    text, expected = "note,skid\r\n", []
    for row, (number, note) in enumerate(good):
        # A note is a blank line before the row, or a quoted cell.
        text += note if note == "\n" else ""
        cell = note if note.startswith('"') else "b"
        if row in bad:
            expected.append(text.count("\n") + 1)
        text += f"{cell},{bad.get(row, number)}\n"
    checked = _check(text)
    assert [(each.line, each.column) for each in checked.errors] == [
        (line, "skid") for line in expected
    ]
    assert checked.rows == len(good)


@settings(deadline=None, max_examples=500)
@given(
    raw=st.binary(max_size=300)
    | st.text(alphabet="0123456789,;\t\"'\n\r xyzidsk-+.e_\ufeff\0", max_size=120).map(
        str.encode
    ),
    head=st.sampled_from(["", "skid\n", "id,x,y,z\n", "\ufeffid;skid;x;y;z\r\n"]),
    kind=st.sampled_from([None, "neurons", "positions"]),
    most_rows=st.sampled_from([0, 3, 1_000_000]),
)
@example(raw=b'"', head="", kind=None, most_rows=3)
@example(raw=b"\x85\xff,\r", head="skid\n", kind=None, most_rows=3)
def test_any_bytes_are_checked(
    raw: bytes, head: str, kind: str | None, most_rows: int
) -> None:
    raw = head.encode() + raw
    checked = _check(raw, kind=kind, most_rows=most_rows)
    assert (checked.asked is None) == (checked.error_count > 0)
    lines = len(raw.splitlines())
    for problem in (*checked.errors, *checked.warnings):
        assert 0 <= problem.line <= lines
        assert problem.message
    assert checked.rows <= most_rows
    if checked.asked is not None:
        assert checked.kind == checked.asked.kind == (kind or checked.kind)
        table = checked.asked.table
        assert table["neuron_id" if checked.kind == "neurons" else "x"].null_count == 0
        assert 0 < len(table) <= checked.rows


@pytest.mark.long
@pytest.mark.parametrize(
    "row",
    [
        f"7,{NEURON},217400.25,164242,438817\n",
        "a,b,c,d,e\n",
        '"' + "1" * 60_000 + 'a",,,,\n',
        '"1' + ",111" * 15_000 + 'a",,,,\n',
        '"a\n',
    ],
    ids=["good", "bad", "long", "grouped", "quotes"],
)
def test_time_grows_with_the_length(row: str) -> None:
    """A table 12 times as long may take 40 times as long, but not 144 times."""
    seconds = []
    for size in (100_000, 1_200_000):
        raw = ("id,skid,x,y,z\n" + row * (size // len(row))).encode()
        start = time.perf_counter()
        _check(raw)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 40 * seconds[0] + 0.5


def test_load(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "asked.csv"
    path.write_text("skid\n5\n5\n")
    asked, [warning] = questions.load(str(path), "neurons")
    assert asked.table["neuron_id"].to_pylist() == [5]
    assert warning.line == 0
    path.write_text("skid\n" + "a\n" * 7)
    with pytest.raises(UserError) as raised:
        questions.load(str(path), None)
    said = str(raised.value)
    assert said.startswith(f"{path}: line 2, column skid: 'a' is not an id; write ")
    assert "line 6" in said and "line 7" not in said and said.endswith("; and 2 more")
    for name in (str(tmp_path / "no.csv"), str(tmp_path), "a\0b"):
        with pytest.raises(UserError, match="cannot read "):
            questions.load(name, None)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "－"])
def test_cells_are_no_formulas(start: str) -> None:
    cell = f"{start}SUM(A1)"
    assert questions.neutralised(cell) == f"'{cell}"


@pytest.mark.parametrize("text", ["", "gaba", "-1", "-0.5e3", "+7", "a=1", "'=1", "16"])
def test_other_cells_stay(text: str) -> None:
    assert questions.neutralised(text) == text


@pytest.mark.parametrize(
    ("text", "kind", "rows"),
    [
        ("Body ID\n12\n13\n", "neurons", 2),
        ('"Body ID"\n12\n', "neurons", 1),
        ("sep=;\nid;x;y;z\n1;2;3;4\n", "positions", 1),
        ("skid x y z\n1 2 3 4\n", "positions", 1),
        ("root_id\n\u200b720575940628857210\ufeff\n", "neurons", 1),
    ],
)
def test_as_other_programmes_write(text: str, kind: str, rows: int) -> None:
    checked = questions.check(io.BytesIO(text.encode()))
    assert checked.errors == []
    assert (checked.kind, checked.rows) == (kind, rows)


def test_coordinates_that_are_left_out_are_told() -> None:
    text = b"pre_x,pre_y,pre_z,root_id\n1,2,3,4\n"
    checked = questions.check(io.BytesIO(text))
    assert checked.kind == "neurons"
    assert "pre_x" in checked.warnings[0].message
