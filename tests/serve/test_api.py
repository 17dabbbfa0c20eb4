# SPDX-License-Identifier: Apache-2.0
"""Tests of the service's API over TCP: rights, limits, and malicious requests."""

import concurrent.futures
import pathlib
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.serve import app, uploads
from tests.helpers import serving
from tests.helpers.serving import CSV, POSITIONS, Running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving.running(tmp_path_factory.mktemp("service"), most_jobs=60) as running:
        yield running


def submit(
    client: httpx.Client, text: str = POSITIONS, **values: str
) -> httpx.Response:
    values = {"model": "small", "source": "none"} | values
    return client.post("/api/jobs", params=values, content=text, headers=CSV)


def test_from_rows_to_results(service: Running) -> None:
    with service.client() as client:
        [model] = client.get("/api/models").json()
        assert model["ready"] and model["classes"][0]["short"] == "GABA"
        assert [source["neurons"] for source in model["sources"]] == [True, True]
        answered = submit(client, name="mine\u202e\n")
        assert answered.status_code == 201
        job = serving.finished(client, answered.json()["id"])
        assert job["state"] == "done" and job["name"] == "mine" and job["rows"] == 3
        assert job["answer"]["status"] == {"bad_position": 1, "ok": 2}
        assert job["links"]["neuroglancer"].startswith("https://neuroglancer-demo")
        base = f"/api/jobs/{job['id']}"
        assert client.get(f"{base}/neurons").json() == {
            "total": 2,
            "neurons": [
                {
                    "neuron_id": "7",
                    "synapses": 2,
                    "predicted": 2,
                    "called": "gaba",
                    "counts": {"gaba": 1, "acetylcholine": 0, "dopamine": 1},
                    "uncertain": True,
                },
                {
                    "neuron_id": "8",
                    "synapses": 1,
                    "predicted": 0,
                    "called": None,
                    "counts": {"gaba": 0, "acetylcholine": 0, "dopamine": 0},
                    "uncertain": True,
                },
            ],
        }
        [row] = client.get(f"{base}/synapses?status=bad_position").json()["rows"]
        assert row["position_id"] == "13" and row["x"] is None and row["y"] == 240
        assert set(row["probabilities"].values()) == {None}
        for name, disposition in (
            ("predictions.csv", f'attachment; filename="synister-{job["id"]}.csv"'),
            ("predictions.feather", f'attachment; filename="synister-{job["id"]}'),
            ("report.html", "inline"),
        ):
            got = client.get(f"{base}/{name}")
            assert got.headers["Content-Disposition"].startswith(disposition)
            assert (
                got.content == (service.folder / "jobs" / job["id"] / name).read_bytes()
            )
        assert got.headers["Content-Security-Policy"].startswith("sandbox ")
        assert client.delete(base).status_code == 204
        assert client.get(base).status_code == 404
        assert not (service.folder / "jobs" / job["id"]).exists()


def test_rows_are_checked_before_anything_runs(service: Running) -> None:
    with service.client() as client:
        wrong = "id,x,y,z\n1,2,3,4\n2,a,3,4\n"
        values = {"model": "small"}
        got = client.post("/api/checks", params=values, content=wrong, headers=CSV)
        assert got.status_code == 200 and got.json()["error_count"] == 1
        [error] = got.json()["errors"]
        assert (error["line"], error["column"]) == (3, "x")
        got = submit(client, wrong)
        assert got.status_code == 422 and got.json()["detail"].startswith("line 3: ")
        assert got.json()["check"]["error_count"] == 1
        assert submit(client, "").status_code == 422
        good = client.post("/api/checks", params=values, content=POSITIONS, headers=CSV)
        assert (good.json()["kind"], good.json()["neurons"]) == ("positions", 2)


def test_the_same_request_is_one_job(service: Running) -> None:
    with service.client() as client, service.client(service.other_token) as other:
        text = "x,y,z\n1,2,3\n"
        first = submit(client, text)
        assert first.status_code == 201
        serving.finished(client, first.json()["id"])
        # The table is written in another way, but has the same content.
        again = submit(client, "x;y;z\r\n1.0;2;3.00\r\n", name="other")
        assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
        assert submit(other, text).status_code == 201  # tokens do not share jobs
        assert submit(client, text, source="hemibrain").status_code == 201
        fresh = submit(client, text, fresh="true")
        assert fresh.status_code == 201 and fresh.json()["id"] != first.json()["id"]
        assert submit(client, text).json()["id"] == fresh.json()["id"]
        service.store.report_model("small", 4, serving.CLASSES, True, None)
        assert submit(client, text).status_code == 201  # the model has a new step
        service.store.report_model("small", 3, serving.CLASSES, True, None, "abc")


def test_posts_at_once_make_one_job(service: Running) -> None:
    def post(_: int) -> tuple[int, str]:
        with service.client() as client:
            got = submit(client, "x,y,z\n5,5,5\n")
            return got.status_code, got.json()["id"]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(post, range(24)))
    assert len({job_id for _, job_id in answers}) == 1
    assert sorted(code for code, _ in answers) == [200] * 23 + [201]
    assert service.worker.did.count(answers[0][1]) <= 1


def test_a_second_token_sees_nothing_of_the_first(service: Running) -> None:
    with (
        service.client() as client,
        service.client(service.other_token) as other,
        serving.client(service.url) as anyone,
    ):
        job = submit(client, "x,y,z\n6,6,6\n").json()
        serving.finished(client, job["id"])
        base = f"/api/jobs/{job['id']}"
        pages = ("neurons", "synapses", "report.html")
        files = ("predictions.csv", "predictions.feather")
        for path in (base, *(f"{base}/{name}" for name in (*pages, *files))):
            assert client.get(path).status_code == 200
            assert other.get(path).status_code == 404
            assert anyone.get(path).status_code == 401
        assert other.post(f"{base}/cancel").status_code == 404
        assert other.delete(base).status_code == 404
        assert job["id"] not in other.get("/api/jobs").text
        assert client.get(base).json()["state"] == "done"


def test_what_is_not_there(service: Running) -> None:
    with service.client() as client:
        for job_id in ("0" * 16, "..", "%2e%2e%2f%2e%2e", "a'--", "x" * 5000):
            got = client.get(f"/api/jobs/{job_id}/predictions.csv")
            assert got.status_code == 404
        assert client.get("/api/nothing").status_code == 404
        for path, allowed in (
            ("/api/jobs", "GET, POST"),
            (f"/api/jobs/{'0' * 16}", "DELETE, GET"),
            ("/", "GET"),
        ):
            got = client.put(path)
            assert (got.status_code, got.headers["Allow"]) == (405, allowed)
        assert (
            client.get("/docs").status_code == client.get("/redoc").status_code == 404
        )
        assert submit(client, model="other").status_code == 404
        assert submit(client, source="malevnc").status_code == 422
        assert submit(client, kind="cats").json()["detail"].startswith("kind: ")
        answered = submit(client, "x,y,z\n7,7,7\n").json()
        serving.finished(client, answered["id"])
        base = f"/api/jobs/{answered['id']}"
        for query in (
            "offset=-1",
            "limit=0",
            "limit=1e9",
            "neuron=a",
            "neuron=9" + "9" * 18,
        ):
            assert client.get(f"{base}/synapses?{query}").status_code == 422, query
        assert client.get(f"{base}/synapses?offset={2**40}").json()["rows"] == []


def test_cancelling(service: Running) -> None:
    service.worker.holds.set()
    try:
        with service.client() as client:
            job = submit(client, "x,y,z\n8,8,8\n").json()
            base = f"/api/jobs/{job['id']}"
            serving.wait_for(lambda: client.get(base).json()["stage"] == "predicting")
            waiting = submit(client, "x,y,z\n8,8,9\n").json()
            assert client.get(f"/api/jobs/{waiting['id']}").json()["ahead"] == 0
            third = submit(client, "x,y,z\n8,8,7\n").json()
            assert third["ahead"] == 1
            assert client.delete(base).status_code == 409
            assert client.get(f"{base}/neurons").status_code == 409
            assert client.post(f"{base}/cancel").json()["state"] == "cancelled"
            assert client.post(f"{base}/cancel").json()["state"] == "cancelled"
            for other in (waiting, third):
                cancelled = client.post(f"/api/jobs/{other['id']}/cancel").json()
                assert cancelled["state"] == "cancelled" and cancelled["finished"]
            # A cancelled request can be submitted again.
            assert submit(client, "x,y,z\n8,8,8\n").json()["id"] != job["id"]
    finally:
        service.worker.holds.clear()


def test_cookies_need_the_csrf_token(service: Running) -> None:
    with service.browser() as browser:
        told = browser.get("/api/session").json()
        assert (
            told["name"] == "first" and told["csrf"] == browser.headers["X-CSRF-Token"]
        )
        [one] = browser.cookies.jar
        assert one.has_nonstandard_attr("HttpOnly")
        assert one.get_nonstandard_attr("SameSite") == "strict"
        text = "x,y,z\n9,9,9\n"
        job = submit(browser, text).json()
        right = browser.headers.pop("X-CSRF-Token")
        for given in (None, "", "x", right[:-1], "\xe9"):
            headers = {} if given is None else {"X-CSRF-Token": given.encode()}
            post = browser.post(f"/api/jobs/{job['id']}/cancel", headers=headers)
            assert post.status_code == 403
            assert browser.delete("/api/session", headers=headers).status_code == 403
        assert browser.get("/api/jobs").status_code == 200
        browser.headers["X-CSRF-Token"] = right
        # Even with the right CSRF token, a request from another site is refused.
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ):
            assert browser.delete("/api/session", headers=headers).status_code == 403
        own = {"Origin": service.url, "Sec-Fetch-Site": "same-origin"}
        assert browser.delete("/api/session", headers=own).status_code == 204
        assert browser.get("/api/session").status_code == 401


def test_ways_to_show_a_token(service: Running) -> None:
    def ask(auth: httpx.Auth | None = None, **headers: str) -> int:
        with serving.client(service.url, **headers) as anyone:
            return anyone.get("/api/jobs", auth=auth).status_code

    assert ask() == 401
    assert ask(Authorization=f"Bearer {service.token}") == 200
    assert ask(Authorization=f"bearer {service.token}") == 200
    assert ask(httpx.BasicAuth("anyone", service.token)) == 200
    for wrong in (
        "Bearer",
        "Bearer x",
        "Basic !",
        "Basic w6k=",
        "Basic OnjigKY=",
        "X y",
    ):
        assert ask(Authorization=wrong) == 401
    assert ask(Cookie="synister_session=x") == 401
    # A wrong token is refused, although the cookie is valid.
    with service.browser() as browser:
        headers = {"Authorization": "Bearer x"}
        assert browser.get("/api/jobs", headers=headers).status_code == 401


def test_logins_are_limited(tmp_path: pathlib.Path) -> None:
    with serving.running(tmp_path) as service:
        with serving.client(service.url) as client:
            codes = [
                client.post("/api/session", json={"token": f"guess{n}"}).status_code
                for n in range(12)
            ]
            assert codes == [401] * 10 + [429] * 2
            right = client.post("/api/session", json={"token": service.token})
            assert right.status_code == 429 and int(right.headers["Retry-After"]) <= 6


def test_limits(tmp_path: pathlib.Path) -> None:
    limits = {"most_jobs": 2, "most_rows": 3, "most_bytes": 20_000}
    with serving.running(tmp_path, requests_per_minute=120, **limits) as service:
        with service.client() as client, service.client(service.other_token) as other:
            told = client.get("/api/session").json()
            assert told["limits"]["rows"] == 3
            got = submit(client, "x,y,z\n" + "1,1,1\n" * 4)
            assert got.status_code == 422 and "3" in got.json()["detail"]
            service.worker.holds.set()
            assert submit(client, "x,y,z\n1,1,1\n").status_code == 201
            assert submit(client, "x,y,z\n2,1,1\n").status_code == 201
            assert submit(client, "x,y,z\n2,1,1\n").status_code == 200
            got = submit(client, "x,y,z\n3,1,1\n")
            assert got.status_code == 429 and "Retry-After" in got.headers
            assert submit(other, "x,y,z\n3,1,1\n").status_code == 201
            service.worker.holds.clear()
            mine = [job["id"] for job in client.get("/api/jobs").json()["jobs"]]
            for job_id in mine:
                serving.finished(client, job_id)
            got = submit(client, "x,y,z\n3,1,1\n")  # 2 × 12,345 bytes are stored
            assert got.status_code == 429 and "bytes" in got.json()["detail"]
            assert client.delete(f"/api/jobs/{mine[0]}").status_code == 204
            assert submit(client, "x,y,z\n3,1,1\n").status_code == 201
            assert len(list((service.folder / "jobs").iterdir())) == 3
            codes = [client.get("/api/jobs").status_code for _ in range(40)]
            assert codes[-1] == 429 and set(codes) == {200, 429}
            assert other.get("/api/jobs").status_code == 200


def test_large_bodies_are_cut(service: Running) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x,y,z\n"
        for _ in range(uploads.MOST_BYTES // (1 << 20) + 1):
            yield b"\n" * (1 << 20)

    with service.client() as client:
        where = {"params": {"model": "small"}, "headers": CSV}
        got = client.post("/api/checks", content=pieces(), **where)
        assert got.status_code == 413
        got = client.post("/api/jobs", content=b"".join(pieces()), **where)
        assert got.status_code == 413
        for kind in ("application/json", "multipart/form-data; boundary=x", ""):
            headers = {"Content-Type": kind}
            got = client.post("/api/checks?model=small", content="1", headers=headers)
            assert got.status_code == 415
        assert not list((service.folder / "uploads").iterdir())


def raw(service: Running, request: bytes, ends: bool = False) -> bytes:
    """Sends exactly these bytes, then ends the stream if `ends`; returns the answer."""
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_signing_in_takes_a_small_body(service: Running) -> None:
    large = b'{"token": "' + b"x" * 100_000 + b'"}'
    kind = {"Content-Type": "application/json"}
    with httpx.Client(base_url=service.url) as client:
        answered = client.post("/api/session", content=large, headers=kind)
        assert answered.status_code == 413
        pieces = (large[i : i + 10_000] for i in range(0, len(large), 10_000))
        answered = client.post("/api/session", content=pieces, headers=kind)
        assert answered.status_code == 400


def test_lying_lengths_and_broken_requests(service: Running) -> None:
    head = (
        "POST /api/checks?model=small HTTP/1.1\r\nHost: localhost\r\n"
        "Connection: close\r\n"
        f"Authorization: Bearer {service.token}\r\nContent-Type: text/csv\r\n"
    )
    body = b"x,y,z\n1,2,3\n"

    def send(length: str, ends: bool = False) -> bytes:
        return raw(service, f"{head}{length}\r\n\r\n".encode() + body, ends)

    assert b'"rows":1' in send(f"Content-Length: {len(body)}")
    assert send("Content-Length: 1000", ends=True) == b""  # the body is too short
    assert b"there is no row" in send("Content-Length: 6")  # only 6 bytes are read
    for wrong in ("Content-Length: -1", "Content-Length: x", "Transfer-Encoding: x"):
        assert b" 400 " in send(wrong) or b" 501 " in send(wrong)
    assert b" 400 " in raw(service, b"nonsense\r\n\r\n")
    with service.client() as client:
        assert client.get("/health").json() == {"status": "ok", "workers": 1}


def test_other_hosts_are_refused(service: Running) -> None:
    def ask(host: str) -> int:
        with serving.client(service.url, Host=host) as anyone:
            return anyone.get("/health").status_code

    for host in ("localhost", "LOCALHOST:9", "127.0.0.1:80", "[::1]:80", "192.168.0.9"):
        assert ask(host) == 200, host
    for host in ("evil.example", "localhost.evil.example", "", "a b", "[::1", "1.2.3"):
        assert ask(host) == 400, host


def test_headers_of_every_answer(service: Running) -> None:
    with service.client() as client:
        for path in ("/", "/static/page.js", "/api/jobs", "/nothing", "/openapi.json"):
            headers = client.get(path).headers
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'") and "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert headers["Cache-Control"] == "no-store"
            assert "Access-Control-Allow-Origin" not in headers


def test_all_that_the_page_asks_for_is_served(service: Running) -> None:
    types = {".css": "text/css", ".js": "text/javascript"}
    with serving.client(service.url) as anyone:
        page = anyone.get("/").text
        paths = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
        for path in paths:  # the list grows in this loop
            got = anyone.get(path)
            assert got.status_code == 200, path
            kind = types[pathlib.PurePosixPath(path).suffix]
            assert got.headers["Content-Type"].startswith(kind), path
            imports = re.findall(r'^(?:import|export|}) .*"\./(.+)";$', got.text, re.M)
            new = (f"/static/{name}" for name in sorted(imports))
            paths += [each for each in new if each not in paths]
    folder = pathlib.Path(app.__file__).parent / "static"
    there = {
        f"/static/{path.name}" for path in folder.iterdir() if path.suffix in types
    }
    assert set(paths) == there  # no file is unused


def test_a_point_while_one_waits(service: Running) -> None:
    with service.client() as client:
        where = {"x": 1.5, "y": 2, "z": 3, "connector_id": "17"}
        got = client.get("/fetch-neurotransmitter", params=where)
        assert got.json() == {
            "connector_id": "17",
            "neurotransmitter_name": "gaba",
            "probabilities": {"gaba": 0.8, "acetylcholine": 0.1, "dopamine": 0.1},
            "status": "ok",
            "model": "small",
        }
        began = time.monotonic()
        again = client.get("/fetch-neurotransmitter", params=where)
        assert again.json() == got.json()
        assert time.monotonic() - began < 1
        failed = client.get("/fetch-neurotransmitter", params=where | {"x": -404})
        assert failed.status_code == 503 and "Retry-After" in failed.headers
        for wrong in ({"x": "nan"}, {"x": "inf"}, {"x": "1e99"}, {"x": "a"}, {"z": ""}):
            got = client.get("/fetch-neurotransmitter", params=where | wrong)
            assert got.status_code == 422, wrong


def test_neuroglancer_asks_without_a_token(service: Running) -> None:
    with service.client() as client:
        job = submit(client, "x,y,z\n400,100,80\n").json()
        link = serving.finished(client, job["id"])["links"]["neuroglancer"]
        key = service.store.jobs(1)[0].view_key
        assert key in link and key not in client.get("/api/jobs").text
    base = f"/view/{key}"
    with serving.client(service.url) as anyone:
        info = anyone.get(f"{base}/annotations/info")
        assert info.json()["annotation_type"] == "POINT"
        assert info.headers["Access-Control-Allow-Origin"] == "*"
        assert info.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
        assert anyone.get(f"{base}/annotations/spatial0/0_0_0").content[:1] == b"\x01"
        assert len(anyone.get(f"{base}/annotations/by_id/0").content) > 20
        assert anyone.get(f"{base}/annotations/by_id/5").status_code == 404
        assert anyone.get(f"{base}/volume/info").status_code == 503  # no volume
        wrong = anyone.get(f"/view/{'A' * 22}/annotations/info")
        assert wrong.status_code == 404


def test_the_log_says_nothing_of_whom_or_what(
    service: Running, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "424242424242"
    with service.client() as client, service.browser() as browser:
        job = submit(client, f"skid\n{secret}\n", name="nameofmine").json()
        serving.finished(client, job["id"])
        client.get(f"/api/jobs/{job['id']}/neurons?search={secret}")
        browser.get("/api/session")
        client.get("/fetch-neurotransmitter?x=1&y=2&z=31337")
        client.post("/api/session", json={"token": {"wrong": secret}})
        # This causes an unexpected error, with the secret in its text.
        (service.folder / "jobs" / job["id"] / "answer.json").write_text(f"{{{secret}")
        assert client.get(f"/api/jobs/{job['id']}").status_code == 500
        csrf = browser.headers["X-CSRF-Token"]
        session = next(iter(browser.cookies.jar)).value
    said = "".join(capfd.readouterr())
    assert "GET /api/jobs/{job_id}/neurons 200 " in said and "UserError" in said
    key = service.store.job(job["id"], 1).view_key
    for hidden in (secret, service.token, csrf, session, key, job["id"], "31337"):
        assert hidden not in said


@pytest.mark.long
def test_answers_of_many_rows_come_quickly(service: Running) -> None:
    rows = 100_000
    lines = (f"{n},{n % 1000},{n},{n},{n}" for n in range(rows))
    text = "id,skid,x,y,z\n" + "\n".join(lines) + "\n"
    with service.client() as client:
        job = submit(client, text).json()
        serving.finished(client, job["id"])
        base = f"/api/jobs/{job['id']}"
        for path, total in (
            ("neurons", 1000),
            ("neurons?search=99", 19),
            ("synapses?offset=99990", rows),
            ("synapses?search=4242", 20),
            ("synapses?neuron=7&called=gaba", 33),
            ("synapses?called=none", 0),
            ("synapses?called=cats", 0),
        ):
            client.get(f"{base}/{path}")
            began = time.monotonic()
            page = client.get(f"{base}/{path}").json()
            assert time.monotonic() - began < 1  # typically 30 ms
            assert page["total"] == total, path
        last = client.get(f"{base}/synapses?offset=99995&limit=10").json()["rows"]
        assert [row["position_id"] for row in last] == [
            str(rows - n) for n in (5, 4, 3, 2, 1)
        ]
        path = service.folder / "jobs" / job["id"] / "predictions.feather"
        downloaded = client.get(f"{base}/predictions.feather").content
        table = feather.read_table(pa.BufferReader(downloaded))
        assert table.equals(feather.read_table(path))
