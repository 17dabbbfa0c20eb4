# SPDX-License-Identifier: Apache-2.0
"""Reads and checks the rows that users send.

The size and the time of an upload are limited. The body is kept on disk, and another
thread checks the rows.
"""

import asyncio
import dataclasses
import hashlib
import json
import tempfile
from typing import BinaryIO

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool

from synister_jax.base import files
from synister_jax.ondemand import questions
from synister_jax.ondemand.questions import Asked, Checked, LineProblem
from synister_jax.serve import schemas
from synister_jax.serve.records import Report
from synister_jax.serve.served_models import ServedModel
from synister_jax.serve.service import Service
from synister_jax.serve.tokens import User

MOST_BYTES = 16 << 20
# A client does not read the answer while it still sends. So the service reads a body
# that is too large up to this size before it answers.
_MOST_DRAINED = 64 << 20
_SECONDS = 60
_TYPES = ("text/csv", "text/plain")
# This part of the OpenAPI schema is written by hand, because FastAPI does not read the
# body itself.
BODY = {
    "requestBody": {
        "required": True,
        "description": f"CSV or pasted text of at most {MOST_BYTES >> 20} MiB",
        "content": {kind: {"schema": {"type": "string"}} for kind in _TYPES},
    }
}


async def checked(
    request: Request,
    served: Service,
    user: User,
    model: ServedModel,
    source: str,
    kind: schemas.Kind | None,
) -> Checked:
    """Reads the body of a request and returns its checked rows.

    The answer is 408 if the body arrives too slowly, 413 if the body is too large, and
    415 if the content type is wrong.

    Args:
      request: The request, whose body is not read yet.
      served: The service.
      user: The user, whose uploads are limited.
      model: The model that the request names.
      source: The source that the request names.
      kind: What the rows are, or None to find out from the rows.
    """
    given = request.headers.get("Content-Type")
    if given is not None and given.partition(";")[0].strip().lower() not in _TYPES:
        raise HTTPException(415, f"send the rows as {' or '.join(_TYPES)}")
    folder = served.folder / "uploads"
    async with served.uploads(user.token_id):
        # The file has no name, so nothing of the file remains if the server ends.
        with tempfile.TemporaryFile(dir=folder) as body:
            try:
                async with asyncio.timeout(_SECONDS):
                    await _read(request, body)
            except TimeoutError:
                why = f"the body did not arrive within {_SECONDS} s; send fewer rows"
                raise HTTPException(408, why, {"Connection": "close"}) from None
            body.seek(0)
            async with served.parsing:
                most = served.options.most_rows
                found = await run_in_threadpool(questions.check, body, kind, most)
    if found.kind == "neurons" and not model.finds_neurons(source):
        why = "neurons cannot be looked up for this model; give positions instead"
        error = LineProblem(0, "", why)
        return dataclasses.replace(
            found,
            asked=None,
            errors=[error, *found.errors[:99]],
            error_count=found.error_count + 1,
        )
    return found


async def _read(request: Request, body: BinaryIO) -> None:
    """Writes the body to a file; the header Content-Length is not trusted."""
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size <= MOST_BYTES:
            body.write(piece)
        elif size > _MOST_DRAINED:
            break
    if size > MOST_BYTES:
        why = f"the body is larger than {MOST_BYTES >> 20} MiB; send it in parts"
        raise HTTPException(413, why, {"Connection": "close"})


def shape(found: Checked, seconds_a_row: float | None) -> schemas.Check:
    """Returns the API's form of checked rows.

    Args:
      found: The checked rows.
      seconds_a_row: The seconds that the model takes for a row, or None if unknown.
        Only a request of positions gets a time, because the number of synapses of a
        neuron is not known before the job.
    """
    asked = found.asked
    neurons = 0
    if asked is not None and "neuron_id" in asked.table.column_names:
        column = asked.table["neuron_id"]
        neurons = len(column.unique().drop_null())
    seconds = None
    if found.kind == "positions" and seconds_a_row is not None:
        seconds = round(found.rows * seconds_a_row, 1)
    return schemas.Check(
        kind=found.kind,
        rows=found.rows,
        neurons=neurons,
        errors=[schemas.Problem(**dataclasses.asdict(p)) for p in found.errors],
        error_count=found.error_count,
        warnings=[schemas.Problem(**dataclasses.asdict(p)) for p in found.warnings],
        warning_count=found.warning_count,
        seconds=seconds,
    )


def request_key(asked: Asked, model: ServedModel, source: str, report: Report) -> str:
    """Returns a hash that is equal for requests with the same answer.

    The hash covers the rows, the model and the source, but not the text form of the
    rows.
    """
    names = asked.table.column_names
    made_of = [
        *(model.name, model.volume, model.synapses, model.calibrated, source),
        *(report.step, report.parameters, asked.kind, names),
        files.sha256_of_columns(asked.table, names),
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
