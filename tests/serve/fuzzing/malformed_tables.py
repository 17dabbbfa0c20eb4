# SPDX-License-Identifier: Apache-2.0
"""Makes malformed tables.

Every table starts as a valid table, and is changed in up to three ways.
"""

import gzip
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from tests.serve.fuzzing.attempts import one

# Cells that are not numbers, are too large, or are numbers in an unusual spelling.
_CELLS = (
    *"""
    nan NaN inf -inf Infinity 1e400 -1e400 1e308 -0 +5 00012 0x10 0b1 1_000 1,000 1.5
    1e3 .5 5. 9223372036854775807 9223372036854775808 -9223372036854775808 -1 1e-400
    18446744073709551616 １２３ ١٢٣ १२३ ² ½ Ⅷ −5 =1+1 @SUM(A1) -2+3 #REF! TRUE null {}
    " "" "a a"b "a"b ' NULL None é 💥 <script>alert(1)</script> ${7*7} {{7*7}} %00 %n
    ../../etc/passwd
    """.split(),
    *("", " ", "9" * 400, "9" * 5000, "0." + "0" * 5000 + "1", "x" * 100_000, "\t=1"),
    *("1\u00a0000", "1\u200b2", "\u202e12", "+cmd|' /C calc'!A0", '"""', "\\", "\\n"),
    *("\x00", "a\x00b", "\x1a", "\x7f", "\ufeff", "\ufffd"),
)
_BYTES = (b"\x00", b"\xff", b'"', b"\n", b"\r", b",", b";", b"\t", b"\xed\xa0\x80")
_LINE_ENDS = (
    *(b"\r\n", b"\r", b"\n\r", b"\n\n\n", b"\x0b", b"\x0c", b"\x1e", b"\xc2\x85"),
)
_BEGINNINGS = (
    *(b"PK\x03\x04", b"\x1f\x8b\x08\x00", b"ARROW1\x00\x00", b"PAR1", b"\x89PNG\r\n"),
    *(b"%PDF-1.7\n", b"<?xml version='1.0'?>", b"{", b"[[[[", b"MZ", b"\x7fELF"),
    *(b"-- ", b"\xef\xbb\xbf\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"sep=;"),
    b"\x00\x00\xfe\xff",
)
_ENCODINGS = (
    *("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "utf-8-sig"),
    *("cp037", "shift_jis"),
)
# Headers whose column names contradict each other or are unknown.
_HEADERS = (
    *(b"skid,skid", b"skid,neuron_id", b"x,y", b"x,y,z,x", b"X,Y,Z", b",,,", b"z,y,x"),
    *(b"position_id,id,x,y,z", b"skid,x", b"\xef\xbb\xbfskid", b" skid ", b'"skid"'),
    *(b"x" * 70_000, b"id", b"=skid", b"nt_gaba_prob,x,y,z", b"0,1,2", b"skid,"),
)
_RIGHT = (
    (["skid"], [1]),
    (["neuron_id", "note"], [1, 0]),
    (["position_id", "x", "y", "z"], [0, 2, 3, 4]),
    (["id", "skid", "x", "y", "z"], [0, 1, 2, 3, 4]),
    ([], [1]),
    ([], [2, 3, 4]),
    ([], [0, 1, 2, 3, 4]),
)


def table(positions: Sequence[Sequence[float]], rng: np.random.Generator) -> bytes:
    """Returns a valid table of a few neurons or positions.

    Args:
      positions: Rows of id, neuron, x, y, z.
    """
    chosen = [positions[n] for n in rng.integers(len(positions), size=6)]
    separator = one(rng, ",;\t")
    header, columns = one(rng, _RIGHT)
    lines = [header] * bool(header)
    lines += [[str(row[column]) for column in columns] for row in chosen]
    return "\n".join(map(separator.join, lines)).encode() + b"\n"


def mutated(positions: Sequence[Sequence[float]], rng: np.random.Generator) -> bytes:
    """Returns a table with up to three changes, which are not always errors."""
    body = table(positions, rng)
    for _ in range(rng.integers(1, 4)):
        if len(body) < 1 << 20:  # larger tables take too long
            body = one(rng, _MUTATORS)(body, rng)
    return body


def large(rng: np.random.Generator) -> bytes:
    """Returns a table of megabytes, which would show a waste of time or memory."""
    return one(rng, _LARGE)()


def compressed(body: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Returns a Content-Encoding, and a body that is not always encoded like this."""
    bomb = b"1\n" * (30 << 20)
    if rng.random() < 0.1:
        squeezed = gzip.compress(bomb, 6)
        return "gzip", one(rng, (squeezed, gzip.compress(squeezed)))
    choices = (
        ("gzip, gzip", gzip.compress(body)),
        ("deflate", zlib.compress(body)),
        ("br", body),
        ("gzip", body),
        ("zstd", b"\x28\xb5\x2f\xfd" + body),
        ("identity", body),
        ("x" * 500, body),
    )
    return one(rng, choices)


def _flip(body: bytes, rng: np.random.Generator) -> bytes:
    changed = np.frombuffer(body or b"\0", np.uint8).copy()
    places = rng.integers(len(changed), size=rng.integers(1, 20))
    changed[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
    return changed.tobytes()


def _truncate(body: bytes, rng: np.random.Generator) -> bytes:
    return body[: rng.integers(len(body) + 1)]


def _insert(body: bytes, rng: np.random.Generator) -> bytes:
    place = rng.integers(len(body) + 1)
    return body[:place] + one(rng, _BYTES) * one(rng, (1, 1, 2, 1000)) + body[place:]


def _cell(body: bytes, rng: np.random.Generator) -> bytes:
    """Replaces a cell by an odd cell, sometimes in quotes."""
    lines = body.split(b"\n")
    line = rng.integers(len(lines))
    separator = next((s for s in (b",", b";", b"\t") if s in lines[line]), b",")
    cells = lines[line].split(separator)
    cell = one(rng, _CELLS).encode("utf-8", "surrogatepass")
    cells[rng.integers(len(cells))] = b'"%s"' % cell if rng.random() < 0.3 else cell
    lines[line] = separator.join(cells)
    return b"\n".join(lines)


def _more_cells(body: bytes, rng: np.random.Generator) -> bytes:
    lines = body.split(b"\n")
    lines[rng.integers(len(lines))] += b",".join([b"1"] * one(rng, (2, 3, 50, 5000)))
    return b"\n".join(lines)


def _repeat(body: bytes, rng: np.random.Generator) -> bytes:
    """Repeats the header, and the whole table up to 50 times."""
    return one(rng, (1, 2, 50)) * body + body.split(b"\n")[0] + b"\n" + body


def _ends(body: bytes, rng: np.random.Generator) -> bytes:
    return body.replace(b"\n", one(rng, _LINE_ENDS))


def _quotes(body: bytes, rng: np.random.Generator) -> bytes:
    inner = body.replace(b'"', b'""')
    choices = (
        b'"' + inner,
        b'"' + inner + b'"',
        b'"' * rng.integers(1, 2000) + body,
        b'"'.join(body.split(b",")),
        body.replace(b",", b'","'),
        b'"a\nb",' * 500 + body,
    )
    return one(rng, choices)


def _encode(body: bytes, rng: np.random.Generator) -> bytes:
    return body.decode("utf-8", "replace").encode(one(rng, _ENCODINGS), "replace")


def _begin(body: bytes, rng: np.random.Generator) -> bytes:
    return one(rng, _BEGINNINGS) + body


def _noise(body: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(one(rng, (0, 1, 7, 4096, 100_000)))


def _headers(body: bytes, rng: np.random.Generator) -> bytes:
    return one(rng, _HEADERS) + b"\n" + body


_MUTATORS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    *(_flip, _truncate, _insert, _cell, _cell, _cell, _more_cells, _repeat, _ends),
    *(_quotes, _encode, _begin, _noise, _headers),
)
_LARGE: tuple[Callable[[], bytes], ...] = (
    lambda: b",".join([b"1"] * 1_000_000),
    lambda: b",".join([b"x"] * 1_000_000) + b"\n1\n",
    lambda: b"skid\n" + b"1\n" * 1_000_000,
    lambda: b"skid\n" + b"x\n" * 1_000_000,
    lambda: b"\n" * 4_000_000,
    lambda: b'"' * 4_000_000,
    lambda: b'"a' * 1_000_000,
    lambda: b"skid\n" + b"9" * 4_000_000,
    lambda: b"x,y,z\n" + b"1,2\n" * 500_000,
    lambda: b"x,y,z\n" + b",,\n" * 500_000,
    lambda: b"skid\n" + "\n".join(map(str, range(400_000))).encode(),
    lambda: b"1 " * 2_000_000,
    lambda: b"skid\n" + b"a" * 10 + b'"\n,"' * 500_000,
    lambda: b"\x00" * 4_000_000,
    lambda: b"[" * 1_000_000,
    lambda: b"\xff" * 4_000_000,
    lambda: b"1\n" * ((16 << 20) // 2 - 2),
    lambda: b"1\n" * (10 << 20),
)
