# SPDX-License-Identifier: Apache-2.0
"""The objects that every route needs: the store, models, limits and the user."""

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
_VIEWS_A_MINUTE = 6000  # Neuroglancer sends one request for each chunk
_PARSED_AT_ONCE = 4
_UPLOADS_AT_ONCE = 8  # for each token


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
    """The options of the command line; synister_jax/serve/__main__.py explains them."""

    host: str = "127.0.0.1"
    public_url: str | None = None  # the address of the proxy, if there is one
    neuroglancer: str = annotations.NEUROGLANCER
    most_rows: int = 100_000
    most_jobs: int = 20
    most_bytes: int = 2 << 30
    requests_per_minute: int = 1200


class Service:
    """The state of the server, made once in a process.

    Args:
      folder: The state folder of the service.
      store: The store of the service.
      models: The served models by name.
      networks: The facts about the network of each model, by the same names.
      options: The options of the command line.
      workers: A function that returns the number of running workers.
    """

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
        """Returns the semaphore that limits the bodies of a token read at once."""
        new = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        return self._uploads.setdefault(token_id, new)

    def model(self, name: str) -> ServedModel:
        """Returns the model of a name; otherwise the answer is 404."""
        if name not in self.models:
            raise HTTPException(404, "there is no model of this name; see /api/models")
        return self.models[name]

    def source(self, model: ServedModel, name: str | None) -> str:
        """Returns the name of a source of the model; otherwise the answer is 422.

        For None, the result is the first source of the model.
        """
        if name is None:
            return model.sources[0]
        if name not in model.sources:
            there = ", ".join(model.sources)
            raise HTTPException(
                422, f"source: model {model.name} has only the sources {there}"
            )
        return name

    def report(self, model: ServedModel) -> Report:
        """Returns the report on a model that is ready; otherwise the answer is 503."""
        report = self.store.reports().get(model.name)
        if report is None:
            why = f"model {model.name} is being opened; try again in a few seconds"
            raise HTTPException(503, why, {"Retry-After": "5"})
        if not report.ready:
            why = (
                f"model {model.name} cannot be used now; ask the person who runs the "
                "service"
            )
            raise HTTPException(503, why, {"Retry-After": "60"})
        return report

    @contextlib.contextmanager
    def answer_file(self, job_id: str, name: str) -> Iterator[pathlib.Path]:
        """Yields the path of a file of a finished job.

        The answer is 404 if the file disappears while it is read. Somebody may delete
        the job meanwhile, or a backup may have been restored only in part.
        """
        path = self.job_folder(job_id) / name
        try:
            yield path
        except (OSError, UserError, pa.ArrowException):
            if path.exists():
                raise
            why = "the answer was deleted; send the same request again"
            raise HTTPException(404, why) from None

    def job_folder(self, job_id: str) -> pathlib.Path:
        """Returns the folder of a job.

        The id must come from the store or be new, never directly from a request.
        """
        return self.folder / "jobs" / job_id


def service(request: Request) -> Service:
    """Returns the service of the application that received the request."""
    return request.app.state.service


def user(request: Request) -> tokens.User:
    """Returns the user who sends the request, and counts the request.

    The answer is 401 without a valid token or session. It is 403 without the session's
    CSRF token, and 429 after too many requests.
    """
    served = service(request)
    found = _shown(request, served)
    if found is None:
        raise revoked()
    require(served.requests, found.token_id)
    if found.csrf is not None and request.method not in SAFE_METHODS:
        given = request.headers.get(CSRF_HEADER, "")
        if not tokens.same(given, found.csrf):
            raise HTTPException(
                403, f"send the csrf of the session in the header {CSRF_HEADER}"
            )
    return found


def revoked() -> HTTPException:
    """Returns the error 401 for a request without a valid token."""
    return HTTPException(
        401,
        "the request has no valid token; sign in, or send the header Authorization: "
        "Bearer TOKEN",
        {"WWW-Authenticate": "Bearer"},
    )


def require(rate: Rate, key: object) -> None:
    """Counts a request; the answer is 429 if the limit is reached."""
    if wait := rate.wait(key):
        seconds = math.ceil(wait)
        why = f"too many requests; try again in {seconds} s"
        raise HTTPException(429, why, {"Retry-After": str(seconds)})


def _shown(request: Request, served: Service) -> tokens.User | None:
    """Returns the user of the header Authorization, or of the cookie without it."""
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
