# SPDX-License-Identifier: Apache-2.0
"""What every route needs: the store, the models, the limits, and who is asking."""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import pyarrow as pa
from fastapi import Depends, HTTPException, Request

from synister_jax.base.errors import UserError
from synister_jax.serve import annotations, tokens
from synister_jax.serve.limits import Rate
from synister_jax.serve.records import Report
from synister_jax.serve.served_models import NetworkFacts, ServedModel
from synister_jax.serve.store import Store

COOKIE = "synister_session"
CSRF_HEADER = "X-CSRF-Token"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_LOGINS_A_MINUTE = 10
_VIEWS_A_MINUTE = 6000  # Neuroglancer asks for each chunk of what it shows
_PARSED_AT_ONCE = 4
_UPLOADS_AT_ONCE = 8  # of a token


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
    """What the command line says."""

    host: str = "127.0.0.1"
    public_url: str | None = None  # how browsers reach the service, if not directly
    neuroglancer: str = annotations.NEUROGLANCER
    most_rows: int = 100_000
    most_jobs: int = 20
    most_bytes: int = 2 << 30
    requests_per_minute: int = 1200


class Service:
    """Made once a process."""

    def __init__(
        self,
        folder: pathlib.Path,
        store: Store,
        models: Mapping[str, ServedModel],
        networks: Mapping[str, NetworkFacts],
        options: ServiceOptions,
        workers: Callable[[], int],
    ) -> None:
        self.folder, self.store, self.options = folder, store, options
        self.models, self.networks, self.workers = models, networks, workers
        a_minute = options.requests_per_minute
        self.requests = Rate(a_minute, max(1, a_minute // 4))
        self.logins = Rate(_LOGINS_A_MINUTE, _LOGINS_A_MINUTE)
        self.views = Rate(_VIEWS_A_MINUTE, _VIEWS_A_MINUTE)
        self.parsing = asyncio.Semaphore(_PARSED_AT_ONCE)
        self._uploads: dict[int, asyncio.Semaphore] = {}

    def uploads(self, token_id: int) -> asyncio.Semaphore:
        """Bodies of one token are read so many at once; the others wait."""
        new = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        return self._uploads.setdefault(token_id, new)

    def model(self, name: str) -> ServedModel:
        """404 where there is none of that name."""
        if name not in self.models:
            raise HTTPException(404, "there is no such model; see /api/models")
        return self.models[name]

    def source(self, model: ServedModel, name: str | None) -> str:
        """The model's source of that name, its first one for None; else 422."""
        if name is None:
            return model.sources[0]
        if name not in model.sources:
            there = ", ".join(model.sources)
            raise HTTPException(422, f"source: model {model.name} has {there}")
        return name

    def report(self, model: ServedModel) -> Report:
        """What a worker said of the model, which can be used; else 503."""
        report = self.store.reports().get(model.name)
        if report is None:
            why = f"model {model.name} is being opened; try again in some seconds"
            raise HTTPException(503, why, {"Retry-After": "5"})
        if not report.ready:
            why = f"model {model.name} cannot be used now; ask who runs the service"
            raise HTTPException(503, why, {"Retry-After": "60"})
        return report

    @contextlib.contextmanager
    def answer_file(self, job_id: str, name: str) -> Iterator[pathlib.Path]:
        """A file of a finished job to be read; 404 where somebody deletes it meanwhile.

        It may be gone without the store's knowledge, too: of a backup put back in part.
        """
        path = self.job_folder(job_id) / name
        try:
            yield path
        except (OSError, UserError, pa.ArrowException):
            if path.exists():
                raise
            why = "the answer is no longer there; ask the same again"
            raise HTTPException(404, why) from None

    def job_folder(self, job_id: str) -> pathlib.Path:
        """Of a job that the store knows: its id is one of ours."""
        return self.folder / "jobs" / job_id


def service(request: Request) -> Service:
    return request.app.state.service


def user(request: Request) -> tokens.User:
    """Who asks, counted against the limit; 401, 403 or 429."""
    served = service(request)
    found = _shown(request, served)
    if found is None:
        raise revoked()
    require(served.requests, found.token_id)
    if found.csrf is not None and request.method not in SAFE_METHODS:
        given = request.headers.get(CSRF_HEADER, "")
        if not tokens.same(given, found.csrf):
            raise HTTPException(403, f"send the session's csrf as {CSRF_HEADER}")
    return found


def revoked() -> HTTPException:
    """401, for no token or one that has ended."""
    return HTTPException(
        401,
        "no valid token: sign in, or send the header Authorization: Bearer TOKEN",
        {"WWW-Authenticate": "Bearer"},
    )


def require(rate: Rate, key: object) -> None:
    """Counts one more; 429 where that is too many."""
    if wait := rate.wait(key):
        seconds = math.ceil(wait)
        why = f"too many requests; try again in {seconds} s"
        raise HTTPException(429, why, {"Retry-After": str(seconds)})


def _shown(request: Request, served: Service) -> tokens.User | None:
    """By the header where there is one, whatever the cookie."""
    database = served.store.database
    header = request.headers.get("Authorization")
    if header is not None:
        scheme, _, given = header.partition(" ")
        if scheme.lower() == "basic":
            try:
                text = base64.b64decode(given, validate=True).decode()
            except (binascii.Error, ValueError):
                return None
            given = text.partition(":")[2]
        elif scheme.lower() != "bearer":
            return None
        return tokens.by_token(database, given.strip())
    cookie = request.cookies.get(COOKIE)
    return None if cookie is None else tokens.by_session(database, cookie)


User = Annotated[tokens.User, Depends(user)]
Served = Annotated[Service, Depends(service)]
