# SPDX-License-Identifier: Apache-2.0
"""Predicts a single position while the client waits, for the extension of CATMAID."""

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query
from starlette.concurrency import run_in_threadpool

from synister_jax.serve import schemas
from synister_jax.serve.records import LimitReached, Revoked
from synister_jax.serve.service import Served, User, revoked

SECONDS = 10.0
_PAUSE = 0.05

router = APIRouter()


@router.get(
    "/fetch-neurotransmitter",
    responses=schemas.errors(401, 404, 422, 429, 503),
    summary="Predicts the transmitter at a position, in the units of the source.",
)
async def fetch(
    served: Served,
    user: User,
    x: schemas.Coordinate,
    y: schemas.Coordinate,
    z: schemas.Coordinate,
    connector_id: Annotated[str | None, Query(pattern="^[0-9]{1,20}$")] = None,
    model: schemas.ModelName | None = None,
    source: schemas.SourceName | None = None,
) -> schemas.Point:
    chosen = served.model(next(iter(served.models)) if model is None else model)
    named = served.source(chosen, source)
    store = served.store

    def ask() -> int:
        served.report(chosen)
        try:
            return store.points.ask(user.token_id, chosen.name, named, x, y, z)
        except Revoked:
            raise revoked() from None
        except LimitReached as error:
            raise HTTPException(429, str(error), {"Retry-After": "5"}) from None

    point_id = await run_in_threadpool(ask)
    until = time.monotonic() + SECONDS
    while True:
        result = await run_in_threadpool(store.points.result, point_id)
        if result is not None:
            break
        if time.monotonic() > until:
            why = "the answer is not ready yet; send the same request again"
            raise HTTPException(503, why, {"Retry-After": "5"})
        await asyncio.sleep(_PAUSE)
    if "problem" in result:
        raise HTTPException(503, result["problem"], {"Retry-After": "60"})
    return schemas.Point(connector_id=connector_id, model=chosen.name, **result)
