# SPDX-License-Identifier: Apache-2.0
"""The API routes for the answer of a job: pages of neurons and synapses, and files."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Annotated, BinaryIO

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import Response, StreamingResponse

from synister_jax.serve import results, schemas, tokens
from synister_jax.serve.jobs_api import find
from synister_jax.serve.service import Served, Service, User

router = APIRouter(prefix="/api/jobs/{job_id}")

_PIECE_BYTES = 1 << 20
_ERRORS = schemas.errors(401, 404, 409, 422, 429)
# The report contains its own policy, which names its script. This second policy keeps
# everything in the report away from the cookie and the API.
_REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@router.get(
    "/neurons",
    responses=_ERRORS,
    summary="Returns a page of the neurons of the answer.",
)
def neurons(
    served: Served,
    user: User,
    job_id: schemas.JobId,
    search: schemas.Search | None = None,
    offset: schemas.Offset = 0,
    limit: schemas.Limit = 100,
) -> schemas.Neurons:
    with _file(served, user, job_id, "predictions.feather") as path:
        return results.neurons_page(path, search, offset, limit)


@router.get(
    "/synapses",
    responses=_ERRORS,
    summary="Returns a page of the synapses of the answer.",
)
def synapses(
    served: Served,
    user: User,
    job_id: schemas.JobId,
    search: schemas.Search | None = None,
    status: Annotated[str | None, Query(max_length=64)] = None,
    called: Annotated[
        str | None,
        Query(max_length=64, description="a class, or `none` without a prediction"),
    ] = None,
    neuron: Annotated[schemas.Whole | None, Query()] = None,
    offset: schemas.Offset = 0,
    limit: schemas.Limit = 100,
) -> schemas.Synapses:
    neuron_id = None if neuron is None else int(neuron)
    if neuron_id is not None and not -(2**63) <= neuron_id < 2**63:
        raise HTTPException(422, "neuron: the id is larger than 64 bits")
    wanted = results.Filter(search or None, status, called, neuron_id)
    with _file(served, user, job_id, "predictions.feather") as path:
        return results.synapses_page(path, wanted, offset, limit)


def _download(kind: str, media_type: str, text: bool = False) -> dict:
    schema = {"type": "string"} if text else {"type": "string", "format": "binary"}
    content = {media_type: {"schema": schema}}
    return {
        "response_class": Response,
        "responses": schemas.errors(401, 404, 409, 429)
        | {
            200: {
                "content": content,
                "description": f"{kind}, in the format that `request` writes",
            }
        },
        "summary": kind,
    }


@router.get("/predictions.csv", **_download("The predictions as CSV", "text/csv", True))
def csv(served: Served, user: User, job_id: schemas.JobId) -> StreamingResponse:
    return _sent(served, user, job_id, "predictions.csv", "text/csv", "attachment")


@router.get(
    "/predictions.feather",
    **_download("The predictions as Feather", "application/vnd.apache.arrow.file"),
)
def feather(served: Served, user: User, job_id: schemas.JobId) -> StreamingResponse:
    kind = "application/vnd.apache.arrow.file"
    return _sent(served, user, job_id, "predictions.feather", kind, "attachment")


@router.get("/report.html", **_download("The report", "text/html", True))
def report(served: Served, user: User, job_id: schemas.JobId) -> StreamingResponse:
    response = _sent(served, user, job_id, "report.html", "text/html", "inline")
    response.headers["Content-Security-Policy"] = _REPORT_POLICY
    # A page in a sandbox cannot use the policy same-origin.
    response.headers["Cross-Origin-Opener-Policy"] = "unsafe-none"
    return response


def _sent(
    served: Service,
    user: tokens.User,
    job_id: str,
    name: str,
    media_type: str,
    disposition: str,
) -> StreamingResponse:
    """Returns a response that sends a file of an answer.

    The file is open before the response starts, so it may be deleted meanwhile.
    """
    with _file(served, user, job_id, name) as path:
        file = path.open("rb")
    shown = f"synister-{job_id}{path.suffix}"
    headers = {
        "Content-Length": str(os.fstat(file.fileno()).st_size),
        "Content-Disposition": f'{disposition}; filename="{shown}"',
    }
    return StreamingResponse(_pieces(file), headers=headers, media_type=media_type)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


@contextlib.contextmanager
def _file(
    served: Service, user: tokens.User, job_id: str, name: str
) -> Iterator[pathlib.Path]:
    """Yields the path of a file of an answer; 409 if the job is not done."""
    found = find(served, user, job_id)
    if found.state != "done":
        raise HTTPException(409, f"the job is {found.state} and has no answer")
    with served.answer_file(found.id, name) as path:
        yield path
