# SPDX-License-Identifier: Apache-2.0
"""Volumes on a real HTTP server that works, fails now and then, or is gone."""

import contextlib
import http.server
import itertools
import json
import os
import pathlib
import re
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from synister_jax.base.errors import UserError
from synister_jax.em import crops, volumes
from tests.helpers.volume_formats import (
    ARRAY_ZYX,
    JPEG_MAKERS,
    MAKERS,
    SHAPE_ZYX,
    make_n5,
    make_zarr,
)

# TensorStore reads this variable only once, at the first request of the process.
os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "1"

CROP_ZYX = (6, 10, 10)
STARTS_VX_ZYX = np.random.default_rng(0).integers(-4, 30, (40, 3))
METADATA = (".zarray", ".zattrs", "zarr.json", "attributes.json", "info")

# Returns the HTTP status of the answer, the name of another failure, or None.
Trouble = Callable[[], int | str | None]


class Server(http.server.ThreadingHTTPServer):
    """Serves `folder`; `trouble` chooses the failure of each request for a chunk."""

    request_queue_size = 128  # connections beyond it wait for a second

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.trouble: Trouble = lambda: None
        self.ranges: list[str] = []
        self.closing = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """Stops the server, which then refuses all connections."""
        if self.closing.is_set():
            return
        self.closing.set()
        self.shutdown()
        self._thread.join()
        self.server_close()  # waits until all handlers end

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that closes its connection early is no error of the server.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    # Headers and body go out in one packet, because two packets would take 40 ms.
    wbufsize = -1

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(200, b"")  # the S3 driver asks in which region a bucket is

    def do_GET(self) -> None:
        place = self.path.partition("?")[0]
        # Google's API names an object like this: /storage/v1/b/BUCKET/o/PATH?alt=media
        place = re.sub(r"^.*/v1/b/([^/]+)/o/", r"/\1/", place)
        path = self.server.folder / urllib.parse.unquote(place).strip("/")
        if not path.is_file():
            self._answer(404, b"")
            return
        trouble = self.server.trouble() if path.name not in METADATA else None
        data = path.read_bytes()
        if trouble is None:
            self._answer_with_range(data)
        elif isinstance(trouble, int):
            self._answer(trouble, b"<html>sorry</html>")
        elif trouble == "truncated":
            self._answer(200, data[: len(data) // 2], len(data))
        elif trouble == "reset":
            at_once = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
        elif trouble == "silent":
            self.server.closing.wait(10)
        else:
            assert trouble == "closed"

    def _answer_with_range(self, data: bytes) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self._answer(200, data)
            return
        self.server.ranges.append(asked)
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= stop:
            self._answer(416, b"")
        else:
            place = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            self._answer(206, data[start:stop], headers=place)

    def _answer(
        self,
        status: int,
        body: bytes,
        length: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        # Google's driver needs the first header, Amazon's driver needs the second.
        self.send_header("x-goog-generation", "1")
        self.send_header("ETag", '"1"')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    quick = {"max_retries": 7, "initial_delay": "10ms", "max_delay": "200ms"}
    monkeypatch.setattr(volumes, "RETRIES", quick)
    with contextlib.closing(Server(tmp_path)) as server:
        yield server


def every_third(troubles: Iterator[int | str | None]) -> Trouble:
    """Lets the first, fourth, seventh, … request fail with the next of `troubles`."""
    lock, requests = threading.Lock(), itertools.count()

    def trouble() -> int | str | None:
        with lock:
            return None if next(requests) % 3 else next(troubles)

    return trouble


def assert_same_crops(uri: str, path: pathlib.Path) -> None:
    remote, local = volumes.open(uri), volumes.open(str(path))
    assert remote.voxel_size_nm_zyx == local.voxel_size_nm_zyx
    assert remote.offset_nm_zyx == local.offset_nm_zyx
    pairs = zip(
        crops.read(remote, STARTS_VX_ZYX, CROP_ZYX),
        crops.read(local, STARTS_VX_ZYX, CROP_ZYX),
        strict=True,
    )
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours.voxels, theirs.voxels)
        assert not ours.unreadable


@pytest.mark.parametrize("kind", [*MAKERS, *JPEG_MAKERS])
def test_crops_over_http_equal_the_local_ones(
    server: Server, tmp_path: pathlib.Path, kind: str
) -> None:
    (MAKERS | JPEG_MAKERS)[kind](tmp_path / "v")
    prefix = kind.partition("_")[0]
    assert_same_crops(f"{server.url}/v", tmp_path / "v")
    assert_same_crops(f"{prefix}://{server.url}/v/", tmp_path / "v")
    assert bool(server.ranges) == ("sharded" in kind)


def test_a_level_of_an_ome_zarr_over_http(
    server: Server, tmp_path: pathlib.Path
) -> None:
    """The voxel size of the level is in the folder above the level."""
    make_zarr(tmp_path / "v" / "s0")
    (tmp_path / "v" / "s0" / ".zattrs").unlink()
    scale = {"type": "scale", "scale": [40, 4, 5]}
    multiscale = {
        "axes": [{"name": name, "unit": "nanometer"} for name in "zyx"],
        "datasets": [{"path": "s0", "coordinateTransformations": [scale]}],
    }
    (tmp_path / "v" / ".zattrs").write_text(json.dumps({"multiscales": [multiscale]}))
    assert_same_crops(f"{server.url}/v/s0", tmp_path / "v" / "s0")


@pytest.mark.parametrize(
    "trouble",
    [408, 429, 500, 502, 503, 504, "closed", "reset", "truncated"],
)
@pytest.mark.parametrize("kind", ["n5", "precomputed_sharded"])
def test_what_fails_now_and_then_is_ridden_out(
    server: Server, tmp_path: pathlib.Path, kind: str, trouble: int | str
) -> None:
    MAKERS[kind](tmp_path / "v")
    server.trouble = every_third(itertools.repeat(trouble))
    assert_same_crops(f"{server.url}/v", tmp_path / "v")


@pytest.mark.long
def test_silence_is_ridden_out(server: Server, tmp_path: pathlib.Path) -> None:
    make_n5(tmp_path / "v")
    silences = itertools.chain(["silent"], itertools.repeat(None))
    server.trouble = every_third(silences)
    assert_same_crops(f"{server.url}/v", tmp_path / "v")


def test_buckets(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public objects are read through the interfaces of Google and of Amazon."""
    path = tmp_path / "bucket" / "v"
    MAKERS["precomputed_sharded"](path)
    server.trouble = every_third(itertools.repeat(503))
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    assert_same_crops("precomputed://gs://bucket/v", path)
    bucket = {
        "driver": "s3",
        "bucket": "bucket",
        "endpoint": server.url,
        "path": "v",
        "aws_region": "us-east-1",
        "aws_credentials": {"type": "anonymous"},
    }
    spec = {"driver": "neuroglancer_precomputed", "kvstore": bucket}
    assert_same_crops(json.dumps(spec), path)


@pytest.mark.long
def test_a_server_that_is_gone_ends_the_reading(
    server: Server, tmp_path: pathlib.Path
) -> None:
    make_n5(tmp_path / "v")
    # The cache has no room, so that each crop needs the server.
    volume = volumes.open(f"{server.url}/v", cache_bytes=0)
    inside = np.random.default_rng(0).integers(0, 20, (40, 3)) // (2, 1, 1)
    reading = crops.read(volume, inside, CROP_ZYX, bytes_in_flight=4000)
    for _, start in zip(range(10), inside, strict=False):
        z, y, x = start
        expected = ARRAY_ZYX[z : z + 6, y : y + 10, x : x + 10]
        np.testing.assert_array_equal(next(reading).voxels, expected)
    server.close()
    since = time.monotonic()
    with pytest.raises(UserError, match="cannot read volume http.*retry.*run again"):
        list(reading)
    with pytest.raises(UserError, match="cannot read .*retry.*check the address"):
        volumes.open(f"{server.url}/v")
    assert time.monotonic() - since < 10


@pytest.mark.long
def test_a_server_that_never_answers_ends_the_reading(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_n5(tmp_path / "v")
    monkeypatch.setitem(volumes.RETRIES, "max_retries", 1)
    server.trouble = lambda: "silent"
    volume = volumes.open(f"{server.url}/v")
    with pytest.raises(UserError, match="cannot read volume"):
        list(crops.read(volume, np.zeros((1, 3), int), (4, 4, 4)))


def test_retries_last_about_a_minute() -> None:
    pauses = 0.5 * 2.0 ** np.arange(volumes.RETRIES["max_retries"])
    assert volumes.RETRIES["initial_delay"] == "500ms"
    longest = float(volumes.RETRIES["max_delay"].removesuffix("s"))
    assert 40 < np.minimum(pauses, longest).sum() < 60


@pytest.mark.parametrize("kind", ["n5", "zarr3_sharded", "precomputed_sharded"])
def test_a_missing_chunk_over_http_is_flagged(
    server: Server, tmp_path: pathlib.Path, kind: str
) -> None:
    stored = ARRAY_ZYX.copy()
    stored[8:16, 0:16, 16:32] = 0  # a whole chunk of zeros is not stored
    MAKERS[kind](tmp_path / "v", stored)
    volume = volumes.open(f"{server.url}/v")
    [crop] = crops.read(volume, np.array([[6, 10, 10]]), (8, 12, 12))
    assert crop.unreadable == ((8, 0, 16),)
    np.testing.assert_array_equal(crop.voxels, stored[6:14, 10:22, 10:22])


def test_files_cut_short_over_http_are_flagged(
    server: Server, tmp_path: pathlib.Path
) -> None:
    MAKERS["precomputed_sharded"](tmp_path / "v")
    for shard in (tmp_path / "v").rglob("*.shard"):
        shard.write_bytes(shard.read_bytes()[:40])
    volume = volumes.open(f"{server.url}/v")
    [crop] = crops.read(volume, np.zeros((1, 3), int), (8, 16, 16))
    assert crop.unreadable == ((0, 0, 0),)


def test_part_of_a_chunk_out_of_range_is_flagged(
    server: Server, tmp_path: pathlib.Path
) -> None:
    make_n5(tmp_path / "v")
    server.trouble = lambda: 416
    volume = volumes.open(f"{server.url}/v")
    [crop] = crops.read(volume, np.zeros((1, 3), int), (8, 16, 16))
    assert crop.unreadable == ((0, 0, 0),)


def test_a_volume_that_vanishes_from_its_server(
    server: Server, tmp_path: pathlib.Path
) -> None:
    make_n5(tmp_path / "v")
    volume = volumes.open(f"{server.url}/v")
    (tmp_path / "v").rename(tmp_path / "unmounted")
    reading = crops.read(volume, np.zeros((1, 3), int), CROP_ZYX)
    with pytest.raises(UserError, match="no longer there: attributes.json .*kept"):
        list(reading)


@pytest.mark.parametrize("status", [400, 401, 403, 501, 520])
def test_a_refusal_is_an_error_not_a_missing_chunk(
    server: Server, tmp_path: pathlib.Path, status: int
) -> None:
    make_n5(tmp_path / "v")
    server.trouble = lambda: status
    volume = volumes.open(f"{server.url}/v")
    advice = "credentials" if status in (401, 403) else "run again"
    with pytest.raises(UserError, match=f"cannot read volume.*{advice}") as raised:
        list(crops.read(volume, np.zeros((1, 3), int), CROP_ZYX))
    assert str(status) in str(raised.value) and "sorry" not in str(raised.value)


def test_a_store_that_refuses_what_is_not_there(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public bucket that does not list its files answers 403 in place of 404."""
    answer = _Handler._answer

    def refusing(self: _Handler, status: int, *args: object, **more: object) -> None:
        answer(self, 403 if status == 404 else status, *args, **more)

    monkeypatch.setattr(_Handler, "_answer", refusing)
    for kind in ("zarr", "precomputed"):
        MAKERS[kind](tmp_path / kind)
        volume = volumes.open(f"{server.url}/{kind}")
        assert volume.shape_zyx == SHAPE_ZYX
    with pytest.raises(UserError, match="no volume at .* no permission"):
        volumes.open(f"{server.url}/nothing")
