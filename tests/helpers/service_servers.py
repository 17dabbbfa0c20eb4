# SPDX-License-Identifier: Apache-2.0
"""Servers that imitate CATMAID, neuPrint, CAVE and the transform service.

The servers have small data, and the tests talk to them over TCP. The docstring of each
server names the documentation or source that its paths, payloads and errors follow.

The list `faults` says what goes wrong with the next requests. An `Answer` replaces the
proper answer. A word like "slow" says how the proper answer is sent wrongly.
"""

import base64
import dataclasses
import http.server
import io
import json
import pathlib
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa


@dataclasses.dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode())


@dataclasses.dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    kind: str = "application/json"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def of_json(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode())


PAGE = Answer(200, b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "text/html")
Fault = Answer | str  # the words are "slow", "cut off", "drop", "drip"


class _Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing: the client has gone, or does not trust the certificate."""


class Server:
    """A server that answers each connection in a new thread, until `close`."""

    def __init__(self, certificate: pathlib.Path | None = None) -> None:
        self.asked: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        answer, take = self.answer, self._take

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # saves 40 ms for each answer

            def _any(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                parts = urlsplit(self.path)
                request = Request(
                    self.command,
                    parts.path,
                    parse_qs(parts.query),
                    self.headers,
                    self.rfile.read(length),
                )
                fault = take(request)
                given = fault if isinstance(fault, Answer) else answer(request)
                _send(self, given, "" if isinstance(fault, Answer) else fault)

            do_GET = do_POST = _any

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = _Quiet(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True
            )
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: Request) -> Answer:
        raise NotImplementedError

    def _take(self, request: Request) -> Fault:
        with self._lock:
            self.asked.append(request)
            return self.faults.pop(0) if self.faults else ""


def _send(
    handler: http.server.BaseHTTPRequestHandler, answer: Answer, fault: str
) -> None:
    if fault == "drop":  # close the connection without an answer
        handler.close_connection = True
        return
    if fault == "slow":
        time.sleep(1)
    try:
        handler.send_response(answer.status)
        handler.send_header("Content-Type", answer.kind)
        handler.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if fault == "drip":
            for byte in answer.body:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(0.05)
        elif fault == "cut off":
            handler.wfile.write(answer.body[: len(answer.body) // 2])
            handler.close_connection = True
        else:
            handler.wfile.write(answer.body)
    except OSError:  # the client has gone
        handler.close_connection = True


class Catmaid(Server):
    """A server with CATMAID's API.

    It follows django/applications/catmaid in the repository catmaid/CATMAID:

    - control/connector.py, `list_connector_links`: POST {project}/connectors/links/ →
      {"links": [[skeleton, connector, x, y, z, confidence, user, treenode, created,
      edited]], "tags": {}}, in no order.
    - control/skeleton.py, `validity`: POST {project}/skeletons/validity → the given ids
      that are skeletons.
    - middleware.py, `AjaxExceptionMiddleware`: an error is {"error", "detail"} with
      status 200.

    A form sends a list as the fields `skeleton_ids[0]`, `skeleton_ids[1]`, … The web
    server in front of CATMAID checks Basic authentication.
    """

    def __init__(
        self,
        links: list[tuple[int, int, float, float, float]],
        empty: list[int] = (),
        token: str = "",
        basic: str = "",
    ) -> None:
        self.links, self.skeletons = links, {row[0] for row in links} | set(empty)
        self._token, self._basic = token, basic
        super().__init__()

    def answer(self, request: Request) -> Answer:
        given = request.headers.get("Authorization", "")
        expected = f"Basic {base64.b64encode(self._basic.encode()).decode()}"
        if self._basic and given != expected:
            return Answer(401, b"<html>401 Authorization Required</html>", "text/html")
        token = request.headers.get("X-Authorization", "")
        if self._token and token != f"Token {self._token}":
            why = "User AnonymousUser does not have the Browse permission"
            return of_json({"error": why, "detail": "…", "type": "PermissionError"})
        form = request.form
        ids = [int(v[0]) for k, v in form.items() if k.startswith("skeleton_ids[")]
        if request.path == "/1/skeletons/validity":
            return of_json([n for n in ids if n in self.skeletons])
        if request.path == "/1/connectors/links/":
            if not ids:
                error = "At least one skeleton ID required"
                return of_json({"error": error, "detail": "Traceback"})
            assert form["relation_type"] == ["presynaptic_to"]
            rows = [row for row in self.links if row[0] in ids]
            when = "2016-05-04T12:00:00+00:00"
            more = [5, 3, 1_000, when, when]
            return of_json({"links": [[*row, *more] for row in rows], "tags": {}})
        return Answer(404, b"<h1>Not Found</h1>", "text/html")


class NeuPrint(Server):
    """A server with neuPrint's API, for the few Cypher queries that our code sends.

    It follows the swaggerdocs and the Go source of connectome-neuprint/neuPrintHTTP:

    - api/dbmeta/dbmeta.go: GET /api/dbmeta/datasets → {name: {"last-mod", "uuid", …}}.
    - api/custom/custom.go: POST /api/custom/custom {"cypher", "dataset"} → {"columns",
      "data": rows}, or 400 {"error"}.
    - secure/dsg.go: 401 {"message"} if the request has no token that the server knows.
    """

    DATASET = "hemibrain:v1.2.1"

    def __init__(
        self,
        certificate: pathlib.Path,
        bodies: dict[int, list[tuple[int, int, int]]],
        token: str = "neuprint-token",
        other_datasets: tuple[str, ...] = (),
    ) -> None:
        self.bodies, self._token = bodies, token
        self._datasets = (self.DATASET, *other_datasets)
        super().__init__(certificate)

    def answer(self, request: Request) -> Answer:
        if request.headers.get("Authorization") != f"Bearer {self._token}":
            return of_json({"message": "invalid or expired token"}, 401)
        if request.path == "/api/dbmeta/datasets":
            about = {"last-mod": "2021-03-15", "uuid": "a0df", "ROIs": ["FB"]}
            return of_json(dict.fromkeys(self._datasets, about))
        if request.path == "/api/custom/custom":
            content = json.loads(request.body)
            if content["dataset"] not in self._datasets:
                return of_json({"error": "dataset not found"}, 400)
            return self._cypher(" ".join(content["cypher"].split()))
        return of_json({"message": "Not Found"}, 404)

    def _cypher(self, cypher: str) -> Answer:
        listed = re.search(r"n.bodyId IN \[([0-9, ]*)\]", cypher)
        ids = [int(n) for n in listed[1].split(",") if n.strip()] if listed else []
        if page := re.fullmatch(
            r"MATCH \(n:Segment\) WHERE n.bodyId > (-?\d+) AND n.pre > 0 "
            r"RETURN n.bodyId, n.pre ORDER BY n.bodyId LIMIT (\d+)",
            cypher,
        ):
            rows = [
                [body, len(points)]
                for body, points in sorted(self.bodies.items())
                if body > int(page[1]) and points
            ]
            return of_json({"columns": [], "data": rows[: int(page[2])]})
        if cypher.endswith("RETURN n.bodyId"):
            rows = [[body] for body in self.bodies if body in ids]
            return of_json({"columns": ["n.bodyId"], "data": rows})
        if "s.type = 'pre'" in cypher and "WITH DISTINCT n, s" in cypher:
            rows = [
                [body, *map(float, xyz)]
                for body in reversed(self.bodies)
                for xyz in self.bodies[body]
                if body in ids
            ]
            return of_json({"columns": [], "data": rows})
        return of_json(
            {"error": f"Neo.ClientError.Statement.SyntaxError {cypher}"}, 400
        )


class Cave(Server):
    """A server with CAVE's API.

    The paths are those that caveclient 8.2.1 requests (endpoints.py). The answers
    follow the servers of CAVE:

    - CAVEconnectome/MaterializationEngine, blueprints/client/common.py and utils.py:
      a query is answered by an Arrow stream of the type `data.arrow`. The stream has at
      most QUERY_LIMIT_SIZE rows, in no order. At this limit, the header `Warning` says
      "Limited query to …". Errors are {"code", "message", "traceback"}.
    - Info service: {"local_server", "segmentation_source", "aligned_volume", …}.
    - PyChunkedGraph: is_latest_roots → {"is_latest": […]}.

    A request without a token is redirected to a login page.
    """

    DATASTACK = "flywire_fafb_public"

    def __init__(
        self,
        rows: list[tuple[int, int, float, float, float]],
        roots: list[int] = (),
        most_rows: int = 500_000,
        token: str = "cave-token",
    ) -> None:
        self.rows, self.roots = rows, {row[1] for row in rows} | set(roots)
        self._most_rows, self._token = most_rows, token
        super().__init__()

    def answer(self, request: Request) -> Answer:
        if request.headers.get("Authorization") != f"Bearer {self._token}":
            login = {"Location": f"{self.url}/auth/api/v1/authorize?redirect=x"}
            return Answer(302, headers=login)
        stack = self.DATASTACK
        table = f"/materialize/api/v3/datastack/{stack}/version/783"
        if request.path in ("/info/version", "/segmentation/api/version"):
            return of_json("4.5.0")
        if request.path == "/materialize/version":
            return of_json("5.15.0")
        if request.path == f"/info/api/v2/datastack/full/{stack}":
            volume = {"name": "fafb_seung_alignment_v0", "id": 1}
            source = "graphene://https://x/segmentation/table/flywire_public"
            about = {"aligned_volume": volume, "segmentation_source": source}
            return of_json(about | {"local_server": self.url, "synapse_table": None})
        if request.path == table:
            time_stamp = "2023-09-30T05:10:00.123456"
            dates = {"time_stamp": time_stamp, "expires_on": time_stamp}
            return of_json({"version": 783, "valid": True} | dates)
        if request.path == f"{table}/table/synapses_nt_v1/query":
            return self._query(json.loads(request.body), request.query)
        roots = "/segmentation/api/v1/table/flywire_public/is_latest_roots"
        if request.path == roots:
            assert request.query["timestamp"] == ["1696050600.123456"]
            ids = json.loads(request.body)["node_ids"]
            return of_json({"is_latest": [root in self.roots for root in ids]})
        return of_json({"code": 404, "message": f"no {request.path}"}, 404)

    def _query(self, asked: dict[str, Any], query: dict[str, list[str]]) -> Answer:
        assert query["split_positions"] == query["return_pyarrow"] == ["True"]
        assert asked["select_columns"] == ["id", "pre_pt_root_id", "pre_pt_position"]
        assert asked["desired_resolution"] == [1, 1, 1]

        def limit(name: str, default: int) -> int:
            return asked.get(name, {}).get("synapses_nt_v1", {}).get("id", default)

        roots = asked["filter_in_dict"]["synapses_nt_v1"]["pre_pt_root_id"]
        first = limit("filter_greater_equal_dict", 0)
        below = limit("filter_less_dict", 1 << 62)
        rows = [r for r in self.rows if r[1] in roots and first <= r[0] < below]
        most = min(self._most_rows, asked["limit"])
        headers = {"dataframe_resolution": "1, 1, 1", "column_names": "{}"}
        if len(rows) >= most:
            rows = rows[::-1][:most]
            headers["Warning"] = f'201 - "Limited query to {most} rows'
        names = ["id", "pre_pt_root_id", *(f"pre_pt_position_{a}" for a in "xyz")]
        types = [pa.int64(), pa.int64(), *[pa.float64()] * 3]
        columns = list(zip(*rows, strict=True)) or [()] * 5
        batch = pa.record_batch(
            [pa.array(v, t) for v, t in zip(columns, types, strict=True)], names
        )
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return Answer(200, sink.getvalue(), "data.arrow", headers)


class Transform(Server):
    """A server with the API of the transform service.

    It follows `transform_values` in app/main.py of flyconnectome/transform_service:
    POST /transform/dataset/flywire_v1/s/4/values {"locations": [[x, y, z], …]}, in
    voxels of 4 x 4 x 40 nm → [{"x", "y", "z", "dx", "dy"}, …]. Numbers that the service
    does not know are null (app/query.py).
    """

    PATH = "/transform/dataset/flywire_v1/s/4/values"

    def __init__(
        self, moved: Callable[[float, float, float], tuple[float, float] | None]
    ) -> None:
        self._moved = moved
        super().__init__()

    def answer(self, request: Request) -> Answer:
        if request.path != self.PATH:
            return of_json({"detail": "Not Found"}, 404)
        points = []
        for x, y, z in json.loads(request.body)["locations"]:
            dx, dy = self._moved(x, y, z) or (None, None)
            new = [None if d is None else c + d for c, d in ((x, dx), (y, dy))]
            points.append({"x": new[0], "y": new[1], "z": z, "dx": dx, "dy": dy})
        return of_json(points)


def make_certificate(folder: pathlib.Path) -> pathlib.Path:
    """Writes a key and its certificate for 127.0.0.1 into one file.

    neuPrint's client needs TLS.

    Raises:
      FileNotFoundError: this machine has no `openssl`.
    """
    path = folder / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    )
    command += " -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    key, certificate = folder / "key", folder / "certificate"
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    path.write_bytes(key.read_bytes() + certificate.read_bytes())
    return path
