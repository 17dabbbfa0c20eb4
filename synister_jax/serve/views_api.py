# SPDX-License-Identifier: Apache-2.0
"""The routes from which Neuroglancer reads the synapses and the volume of a job.

Neuroglancer runs on another site and sends neither a token nor a cookie. So the key in
the address is the permission: everybody who has the key of a job can read its data.
"""

import contextlib
import functools
import pathlib
import threading
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path
from fastapi.responses import JSONResponse, Response

from synister_jax.base.errors import UserError
from synister_jax.em import volumes
from synister_jax.serve import annotations, schemas, volume_view
from synister_jax.serve.records import StoredJob
from synister_jax.serve.served_models import ServedModel
from synister_jax.serve.service import Served, require

router = APIRouter(prefix="/view/{key}")

_CACHE_BYTES = 64 << 20
_PUBLIC = {
    "Access-Control-Allow-Origin": "*",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Cache-Control": "private, max-age=3600",
}
_Number = Annotated[
    int, Path(ge=0, lt=2**64, description="the number of a row, or the id of an object")
]
_opening = threading.Lock()
# A volume that does not answer can block at most this many threads. The other threads
# stay free for the page.
_reading = threading.BoundedSemaphore(12)


def _job(
    served: Served,
    key: Annotated[str, Path(json_schema_extra={"pattern": "^[A-Za-z0-9_-]{22}$"})],
) -> StoredJob:
    job = served.store.job_to_view(key)
    if job is None:
        raise HTTPException(404, "there is no finished job with this key", _PUBLIC)
    require(served.views, job.id)
    return job


Viewed = Annotated[StoredJob, Depends(_job)]
_ERRORS = schemas.errors(404, 422, 429)


def _binary(summary: str, *codes: int) -> dict[str, Any]:
    content = {"application/octet-stream": {"schema": {"type": "string"}}}
    return {
        "response_class": Response,
        "responses": schemas.errors(404, 422, 429, *codes)
        | {200: {"content": content, "description": "bytes in the precomputed format"}},
        "summary": summary,
    }


def _bytes(content: bytes | None) -> Response:
    if content is None:
        raise HTTPException(404, "there is no data with this name", _PUBLIC)
    return Response(content, 200, _PUBLIC, "application/octet-stream")


def _predictions(served: Served, job: Viewed) -> Iterator[pathlib.Path]:
    with served.answer_file(job.id, "predictions.feather") as path:
        yield path


Predictions = Annotated[pathlib.Path, Depends(_predictions)]


@router.get(
    "/annotations/info",
    responses=_ERRORS | {200: {"model": dict[str, Any]}},
    response_class=JSONResponse,
    summary="Describes the synapses as precomputed annotations.",
)
def annotations_info(path: Predictions) -> Response:
    return JSONResponse(annotations.info(path), headers=_PUBLIC)


@router.get("/annotations/spatial0/0_0_0", **_binary("Returns all synapses."))
def spatial(path: Predictions) -> Response:
    return _bytes(annotations.spatial(path))


@router.get("/annotations/by_id/{number}", **_binary("Returns one synapse."))
def by_id(path: Predictions, number: _Number) -> Response:
    return _bytes(annotations.by_id(path, number))


@router.get(
    "/annotations/{relationship}/{number}", **_binary("Returns the synapses of an id.")
)
def related(path: Predictions, relationship: str, number: _Number) -> Response:
    return _bytes(annotations.related(path, relationship, number))


@router.get(
    "/volume/info",
    responses=schemas.errors(404, 422, 429, 503) | {200: {"model": dict[str, Any]}},
    response_class=JSONResponse,
    summary="Describes the volume as a precomputed image.",
)
def volume_info(served: Served, job: Viewed) -> Response:
    with _slot():
        return JSONResponse(volume_view.info(_volume(served, job)), headers=_PUBLIC)


@router.get("/volume/s0/{name}", **_binary("Returns voxels of the volume.", 503))
def voxels(
    served: Served, job: Viewed, name: Annotated[str, Path(max_length=100)]
) -> Response:
    parsed = volume_view.parse(name)
    if parsed is None:
        return _bytes(None)
    try:
        with _slot():
            return _bytes(volume_view.chunk(_volume(served, job), *parsed))
    except (UserError, *volumes.ERRORS):
        raise _unreadable() from None


@router.options("/{path:path}", include_in_schema=False, status_code=204)
def preflight() -> Response:
    """Answers a preflight request of a browser.

    Browsers send this request before a public page may read from a server in a local
    network.
    """
    allowed = {"Access-Control-Allow-Private-Network": "true"}
    return Response(status_code=204, headers=_PUBLIC | allowed)


@contextlib.contextmanager
def _slot() -> Iterator[None]:
    if not _reading.acquire(blocking=False):
        why = "too many chunks of volumes are being read now; try again"
        raise HTTPException(503, why, {"Retry-After": "1"} | _PUBLIC)
    try:
        yield
    finally:
        _reading.release()


def _volume(served: Served, job: StoredJob) -> volumes.Volume:
    if job.model not in served.models:
        raise HTTPException(
            404, "the service does not have the model of this job any more", _PUBLIC
        )
    try:
        with _opening:
            return _open(served.models[job.model])
    except UserError:
        raise _unreadable() from None


@functools.lru_cache(maxsize=8)
def _open(model: ServedModel) -> volumes.Volume:
    return volumes.open(model.volume, cache_bytes=_CACHE_BYTES)


def _unreadable() -> HTTPException:
    why = "the volume cannot be read now; try again"
    return HTTPException(503, why, {"Retry-After": "60"} | _PUBLIC)
