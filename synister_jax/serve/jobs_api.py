# SPDX-License-Identifier: Apache-2.0
"""The API routes that check rows, and that submit, show, cancel and delete jobs."""

import bisect
import datetime
import functools
import secrets
import shutil
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from synister_jax.base import files
from synister_jax.serve import annotations, schemas, tokens, uploads
from synister_jax.serve.records import LimitReached, NewJob, Revoked, StoredJob
from synister_jax.serve.service import Served, Service, User, revoked

router = APIRouter(prefix="/api")

_LONGEST_NAME = 200


@router.post(
    "/checks",
    responses=schemas.errors(401, 403, 404, 408, 413, 415, 422, 429),
    openapi_extra=uploads.BODY,
    summary="Checks rows without asking for predictions.",
)
async def check(
    served: Served,
    user: User,
    request: Request,
    model: schemas.ModelName,
    source: schemas.SourceName | None = None,
    kind: schemas.Kind | None = None,
) -> schemas.Check:
    chosen = served.model(model)
    named = served.source(chosen, source)
    found = await uploads.checked(request, served, user, chosen, named, kind)
    pace = await run_in_threadpool(served.store.seconds_a_row, chosen.name)
    return uploads.shape(found, pace)


@router.post(
    "/jobs",
    status_code=201,
    responses=schemas.errors(401, 403, 404, 408, 413, 415, 429, 503)
    | {
        200: {
            "model": schemas.Job,
            "description": "your existing job of the same request",
        },
        422: {"model": schemas.Refused, "description": "a parameter or a row is wrong"},
    },
    openapi_extra=uploads.BODY,
    summary="Submits a job that predicts the rows.",
)
async def submit(
    served: Served,
    user: User,
    request: Request,
    response: Response,
    model: schemas.ModelName,
    source: schemas.SourceName | None = None,
    kind: schemas.Kind | None = None,
    name: Annotated[str, Query(max_length=_LONGEST_NAME)] = "",
    fresh: Annotated[
        bool, Query(description="predict again even if the same request is finished")
    ] = False,
) -> schemas.Job:
    chosen = served.model(model)
    named = served.source(chosen, source)
    report = await run_in_threadpool(served.report, chosen)
    found = await uploads.checked(request, served, user, chosen, named, kind)
    asked = found.asked
    if asked is None:
        raise Unfit(uploads.shape(found, None))

    def put() -> tuple[StoredJob, bool]:
        key = uploads.request_key(asked, chosen, named, report)
        job_id = secrets.token_hex(8)
        folder = served.job_folder(job_id)
        folder.mkdir(mode=0o700)
        new = NewJob(
            id=job_id,
            token_id=user.token_id,
            model=chosen.name,
            source=named,
            kind=asked.kind,
            name=_shown(name),
            rows=len(asked.table),
            size=asked.table.nbytes,
            step=report.step,
            request_key=key,
        )
        limits = (served.options.most_jobs, served.options.most_bytes)
        is_new = False
        try:
            files.write_feather(folder / "asked.feather", asked.table)
            job, is_new = served.store.submit(new, *limits, fresh)
            answer = served.job_folder(job.id) / "answer.json"
            if job.state == "done" and not answer.exists():
                job, is_new = served.store.submit(new, *limits, fresh=True)
            return job, is_new
        finally:
            if not is_new:
                shutil.rmtree(folder)

    try:
        job, is_new = await run_in_threadpool(put)
    except Revoked:
        raise revoked() from None
    except LimitReached as error:
        raise HTTPException(429, str(error), {"Retry-After": "60"}) from None
    if not is_new:
        response.status_code = 200
    return await run_in_threadpool(_told, served, job, request)


class Unfit(Exception):
    """Rows that cannot be predicted; the answer is 422 with the errors of the rows."""

    def __init__(self, check: schemas.Check) -> None:
        self.check = check
        more = check.error_count - 1
        first = check.errors[0]
        where = f"line {first.line}: " if first.line else ""
        others = f" (and {more:,} more)" if more else ""
        super().__init__(f"{where}{first.message}{others}")


@router.get(
    "/jobs",
    responses=schemas.errors(401, 429),
    summary="Lists your jobs, newest first.",
)
def jobs(served: Served, user: User) -> schemas.Jobs:
    """Lists jobs without `answer` and the link to Neuroglancer.

    `/api/jobs/{job_id}` returns these for one job.
    """
    queue = served.store.queue()
    yours = served.store.jobs(user.token_id)
    return schemas.Jobs(jobs=[_shape(job, queue) for job in yours])


@router.get(
    "/jobs/{job_id}", responses=schemas.errors(401, 404, 429), summary="Returns a job."
)
def job(
    served: Served, user: User, request: Request, job_id: schemas.JobId
) -> schemas.Job:
    return _told(served, find(served, user, job_id), request)


@router.post(
    "/jobs/{job_id}/cancel",
    responses=schemas.errors(401, 403, 404, 429),
    summary="Cancels a job; a job that has ended stays as it is.",
)
def cancel(
    served: Served, user: User, request: Request, job_id: schemas.JobId
) -> schemas.Job:
    found = served.store.cancel(job_id, user.token_id)
    if found is None:
        raise _not_found()
    return _told(served, found, request)


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    responses=schemas.errors(401, 403, 404, 409, 429),
    summary="Deletes a job and its answer; a running job must be cancelled first.",
)
def delete(served: Served, user: User, job_id: schemas.JobId) -> None:
    found = find(served, user, job_id)
    if not served.store.delete(found.id, user.token_id):
        find(served, user, job_id)
        raise HTTPException(409, "the job is running; cancel it first")
    shutil.rmtree(served.job_folder(found.id), ignore_errors=True)


def find(served: Service, user: tokens.User, job_id: str) -> StoredJob:
    """Returns the job of this user with this id; otherwise the answer is 404."""
    found = served.store.job(job_id, user.token_id)
    if found is None:
        raise _not_found()
    return found


def _not_found() -> HTTPException:
    return HTTPException(404, "you have no job with this id")


def _told(served: Service, job: StoredJob, request: Request) -> schemas.Job:
    told = _shape(job, served.store.queue())
    if told.links is None:
        return told
    public = served.options.public_url or str(request.base_url)
    view = f"{public.rstrip('/')}/view/{job.view_key}"
    viewer = served.options.neuroglancer
    with served.answer_file(job.id, "answer.json") as path:
        told.answer = files.read_json(path)
        told.links.neuroglancer = _neuroglancer(
            path.with_name("predictions.feather"), view, viewer
        )
    return told


# The answer of a job does not change, so its link can be cached.
_neuroglancer = functools.lru_cache(maxsize=1000)(annotations.link)


def _shape(job: StoredJob, queue: Sequence[int]) -> schemas.Job:
    """Returns a stored job in the form in which the API sends it.

    Args:
      queue: The numbers of all queued jobs, ascending.
    """
    base = f"/api/jobs/{job.id}"
    links = schemas.Links(
        csv=f"{base}/predictions.csv",
        feather=f"{base}/predictions.feather",
        report=f"{base}/report.html",
        neuroglancer=None,
    )
    eta = job.eta_seconds
    return schemas.Job(
        id=job.id,
        name=job.name,
        model=job.model,
        source=job.source,
        kind=job.kind,
        state=job.state,
        stage=job.stage,
        done=job.done,
        total=job.total,
        eta_seconds=None if eta is None else round(eta, 1),
        ahead=bisect.bisect_left(queue, job.number) if job.state == "queued" else 0,
        rows=job.rows,
        message=job.message,
        created=_iso(job.created),
        started=None if job.started is None else _iso(job.started),
        finished=None if job.finished is None else _iso(job.finished),
        answer=None,
        links=links if job.state == "done" else None,
        bytes=job.bytes,
    )


def _iso(seconds: float) -> str:
    time = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _shown(name: str) -> str:
    """Replaces invisible characters, and those that change the direction of text."""
    return "".join(c if c.isprintable() else " " for c in name).strip()
