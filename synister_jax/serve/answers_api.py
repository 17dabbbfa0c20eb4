# SPDX-License-Identifier: Apache-2.0
"""What came of a job: pages of its neurons and synapses, and files."""

import pathlib
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import FileResponse, Response

from synister_jax.serve import results, shapes, tokens
from synister_jax.serve.jobs_api import find
from synister_jax.serve.service import Served, Service, User

router = APIRouter(prefix="/api/jobs/{job_id}")

_ERRORS = shapes.errors(401, 404, 409, 422, 429)
# The report has a policy of its own that names its script; this one keeps whatever
# might be in it away from the cookie and the API.
_REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@router.get("/neurons", responses=_ERRORS, summary="Neurons of the answer.")
def neurons(
    served: Served,
    user: User,
    job_id: shapes.JobId,
    search: shapes.Search | None = None,
    offset: shapes.Offset = 0,
    limit: shapes.Limit = 100,
) -> shapes.Neurons:
    path = _file(served, user, job_id, "predictions.feather")
    return results.neurons_page(path, search, offset, limit)


@router.get("/synapses", responses=_ERRORS, summary="Synapses of the answer.")
def synapses(
    served: Served,
    user: User,
    job_id: shapes.JobId,
    search: shapes.Search | None = None,
    status: Annotated[str | None, Query(max_length=64)] = None,
    called: Annotated[
        str | None, Query(max_length=64, description="a class, or `none`")
    ] = None,
    neuron: Annotated[shapes.Whole | None, Query()] = None,
    offset: shapes.Offset = 0,
    limit: shapes.Limit = 100,
) -> shapes.Synapses:
    path = _file(served, user, job_id, "predictions.feather")
    neuron_id = None if neuron is None else int(neuron)
    if neuron_id is not None and not -(2**63) <= neuron_id < 2**63:
        raise HTTPException(422, "neuron: an id has 64 bits")
    wanted = results.Filter(search or None, status, called, neuron_id)
    return results.synapses_page(path, wanted, offset, limit)


def _download(kind: str, media_type: str, text: bool = False) -> dict:
    schema = {"type": "string"} if text else {"type": "string", "format": "binary"}
    content = {media_type: {"schema": schema}}
    return {
        "response_class": Response,
        "responses": shapes.errors(401, 404, 409, 429)
        | {200: {"content": content, "description": f"{kind}, as `request` writes it"}},
        "summary": kind,
    }


@router.get("/predictions.csv", **_download("The predictions", "text/csv", True))
def csv(served: Served, user: User, job_id: shapes.JobId) -> FileResponse:
    path = _file(served, user, job_id, "predictions.csv")
    return FileResponse(path, media_type="text/csv", filename=f"synister-{job_id}.csv")


@router.get(
    "/predictions.feather",
    **_download("The predictions as Feather", "application/vnd.apache.arrow.file"),
)
def feather(served: Served, user: User, job_id: shapes.JobId) -> FileResponse:
    path = _file(served, user, job_id, "predictions.feather")
    return FileResponse(
        path,
        media_type="application/vnd.apache.arrow.file",
        filename=f"synister-{job_id}.feather",
    )


@router.get("/report.html", **_download("The report", "text/html", True))
def report(served: Served, user: User, job_id: shapes.JobId) -> FileResponse:
    return FileResponse(
        _file(served, user, job_id, "report.html"),
        # A page in a sandbox may not ask to be alone in its group of windows.
        headers={
            "Content-Security-Policy": _REPORT_POLICY,
            "Cross-Origin-Opener-Policy": "unsafe-none",
        },
        media_type="text/html",
        filename=f"synister-{job_id}.html",
        content_disposition_type="inline",
    )


def _file(served: Service, user: tokens.User, job_id: str, name: str) -> pathlib.Path:
    """A file of an answer; 409 where there is none yet."""
    found = find(served, user, job_id)
    if found.state != "done":
        raise HTTPException(409, f"the job is {found.state}; it has no answer")
    return served.job_folder(found.id) / name
