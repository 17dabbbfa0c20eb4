# SPDX-License-Identifier: Apache-2.0
"""The API routes that sign in and out, and that list the models and their sources."""

from fastapi import APIRouter, HTTPException, Request, Response

from synister_jax.ondemand.sources import SOURCES
from synister_jax.pages import neurons_table
from synister_jax.serve import schemas, tokens
from synister_jax.serve.service import COOKIE, Served, User, require

router = APIRouter(prefix="/api")


@router.post(
    "/session",
    responses=schemas.errors(400, 401, 403, 413, 422, 429),
    summary="Signs a browser in with a token.",
)
def sign_in(
    served: Served, request: Request, response: Response, login: schemas.Login
) -> schemas.LoggedIn:
    require(served.logins, request.client.host if request.client else "")
    database = served.store.database
    user = tokens.by_token(database, login.token)
    if user is None:
        why = "there is no such token; ask the person who runs this service for a token"
        raise HTTPException(401, why, {"WWW-Authenticate": "Bearer"})
    session, csrf = tokens.open_session(database, user)
    public = served.options.public_url or ""
    secure = public.startswith("https:") or request.url.scheme == "https"
    response.set_cookie(
        *(COOKIE, session),
        max_age=int(tokens.SESSION_SECONDS),
        path="/",
        secure=secure,
        httponly=True,
        samesite="strict",
    )
    return schemas.LoggedIn(name=user.name, csrf=csrf)


@router.get(
    "/session",
    responses=schemas.errors(401, 429),
    summary="Returns the name and the limits of the user.",
)
def session(served: Served, user: User) -> schemas.Session:
    options = served.options
    jobs, size = served.store.used(user.token_id)
    return schemas.Session(
        name=user.name,
        csrf=user.csrf,
        limits=schemas.Limits(
            rows=options.most_rows,
            jobs=options.most_jobs,
            bytes=options.most_bytes,
            requests_per_minute=options.requests_per_minute,
        ),
        used=schemas.Used(jobs=jobs, bytes=size),
    )


@router.delete(
    "/session",
    status_code=204,
    responses=schemas.errors(401, 403, 429),
    summary="Signs the browser out.",
)
def sign_out(served: Served, user: User, request: Request, response: Response) -> None:
    if (cookie := request.cookies.get(COOKIE)) is not None:
        tokens.close_session(served.store.database, cookie)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")


@router.get(
    "/models",
    responses=schemas.errors(401, 429),
    summary="Lists the models and their sources.",
)
def models(served: Served, user: User) -> list[schemas.Model]:
    reports = served.store.reports()
    result = []
    for model in served.models.values():
        network, report = served.networks[model.name], reports.get(model.name)
        sources = [SOURCES[name] for name in model.sources]
        result.append(
            schemas.Model(
                name=model.name,
                title=model.title,
                classes=[
                    schemas.Class(name=c.name, short=c.short, colour=c.colour)
                    for c in neurons_table.legend(network.classes)
                ],
                voxel_size_nm_zyx=list(network.voxel_size_nm_zyx),
                crop_shape_zyx=list(network.crop_shape_zyx),
                sources=[
                    schemas.Source(
                        name=source.name,
                        title=source.title,
                        units=source.units,
                        neuron=source.neuron,
                        neurons=model.finds_neurons(source.name),
                    )
                    for source in sources
                ],
                ready=report is not None and report.ready,
                problem=None if report is None else report.problem,
            )
        )
    return result
