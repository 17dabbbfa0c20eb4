# SPDX-License-Identifier: Apache-2.0
"""The web service as an ASGI application: the page, the API and its error answers."""

import importlib.resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response

import synister_jax
from synister_jax.serve import (
    answers_api,
    jobs_api,
    points,
    schemas,
    sessions_api,
    views_api,
)
from synister_jax.serve.guard import Guard
from synister_jax.serve.service import COOKIE, CSRF_HEADER, Service

_PAGE = "page.html"
_STATIC = (  # the files that the page loads from /static/
    "page.css",
    "page.js",
    "elements.js",
    "jobs.js",
    "request.js",
    "server.js",
    "state.js",
    "tables.js",
    "views.js",
)
_MEDIA_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript"}
_SECURITY = {
    "token": {"type": "http", "scheme": "bearer"},
    "password": {
        "type": "http",
        "scheme": "basic",
        "description": "Any user name, with the token as the password.",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": COOKIE,
        "description": f"All methods except GET also need the header {CSRF_HEADER}.",
    },
}


def make(service: Service) -> FastAPI:
    """Returns the ASGI application of a service."""
    app = FastAPI(
        title="synister_jax",
        version=synister_jax.__version__,
        description="Predicts the neurotransmitters of synapses on demand.",
        # The documentation pages of FastAPI load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # No request or its content may be sent to anybody else.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.state.service = service
    options = service.options
    app.add_middleware(Guard, host=options.host, public_url=options.public_url)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(jobs_api.Unfit)(_unfit)
    app.exception_handler(405)(_other_method)
    for module in (sessions_api, jobs_api, answers_api, points, views_api):
        app.include_router(module.router)
    _serve(app, "/", _PAGE)
    for name in _STATIC:
        _serve(app, f"/static/{name}", name)

    @app.get(
        "/health", responses=schemas.errors(), summary="Reports that the service runs."
    )
    def health() -> schemas.Health:
        return schemas.Health(status="ok", workers=service.workers())

    # The documentation of FastAPI recommends this way to change the schema.
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _serve(app: FastAPI, path: str, name: str) -> None:
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
    content = importlib.resources.files("synister_jax.serve") / "static" / name
    text = content.read_text(encoding="utf-8")

    @app.get(path, include_in_schema=False, name=name)
    def page() -> Response:
        return Response(text, media_type=media_type)


def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answers 422 in one line, without the sent value, which may be a token."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "query")
    detail = f"{place}: {first['msg']}"
    return JSONResponse({"detail": detail}, 422)


def _other_method(request: Request, error: HTTPException) -> JSONResponse:
    """Answers 405 with the methods of all routes of the path.

    Starlette names only the methods of the first route.
    """
    methods = _openapi(request.app)["paths"].get(
        request.scope["route"].path, {"get": 0}
    )
    allowed = ", ".join(sorted(method.upper() for method in methods))
    detail = f"this path accepts only {allowed}"
    return JSONResponse({"detail": detail}, 405, {"Allow": allowed})


def _unfit(request: Request, error: jobs_api.Unfit) -> JSONResponse:
    content = {"detail": str(error), "check": error.check.model_dump()}
    return JSONResponse(content, 422)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI schema with the ways to sign in.

    Each route that can answer 401 accepts any of `_SECURITY`.
    """
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        schema["components"]["securitySchemes"] = _SECURITY
        for path, methods in schema["paths"].items():
            for method, operation in methods.items():
                signs_in = (path, method) == ("/api/session", "post")
                if "401" in operation["responses"] and not signs_in:
                    operation["security"] = [{name: []} for name in _SECURITY]
        app.openapi_schema = schema
    return app.openapi_schema
