# SPDX-License-Identifier: Apache-2.0
"""The data types that the API takes and returns.

Ids are strings, because numbers in JavaScript cannot hold 64 bits. `/openapi.json` is
made from these types.
"""

from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import BaseModel, Field, StringConstraints

from synister_jax.ondemand.questions import Kind
from synister_jax.serve.records import State

_ID = {"pattern": "^[0-9a-f]{16}$"}
# The pattern is only documented. The answer to a text that is not an id is 404, as for
# an id without a job.
JobId = Annotated[str, Path(json_schema_extra=_ID)]
ModelName = Annotated[str, Query(max_length=64, description="a name from /api/models")]
SourceName = Annotated[
    str, Query(max_length=64, description="one of the sources of the model")
]
Whole = Annotated[str, StringConstraints(pattern=r"^-?[0-9]{1,19}$")]
Coordinate = Annotated[float, Query(ge=-1e15, le=1e15, allow_inf_nan=False)]
Offset = Annotated[int, Query(ge=0, le=2**40)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Search = Annotated[str, Query(max_length=64, description="a part of an id")]


class Detail(BaseModel):
    """An error: one line that says what is wrong and what to do."""

    detail: str


class Health(BaseModel):
    status: Literal["ok"]
    workers: int


class Login(BaseModel):
    token: Annotated[str, Field(min_length=1, max_length=200)]


class LoggedIn(BaseModel):
    name: str
    csrf: Annotated[str, Field(description="the value for the header X-CSRF-Token")]


class Limits(BaseModel):
    rows: int
    jobs: Annotated[int, Field(description="the largest number of unfinished jobs")]
    bytes: int
    requests_per_minute: int


class Used(BaseModel):
    jobs: int
    bytes: int


class Session(BaseModel):
    name: str
    csrf: Annotated[
        str | None, Field(description="null if the request has the token itself")
    ]
    limits: Limits
    used: Used


class Class(BaseModel):
    name: str
    short: str
    colour: Annotated[
        int, Field(description="number of the colour in the page's palette, 0 to 9")
    ]


class Source(BaseModel):
    name: str
    title: str
    units: str
    neuron: str
    neurons: Annotated[bool, Field(description="whether neuron ids can be looked up")]


class Model(BaseModel):
    name: str
    title: str
    classes: list[Class]
    voxel_size_nm_zyx: list[float]
    crop_shape_zyx: list[int]
    sources: list[Source]
    ready: bool
    problem: str | None


class Problem(BaseModel):
    line: Annotated[int, Field(description="line number from 1; 0 for the whole text")]
    column: Annotated[str, Field(description="empty if the whole row is meant")]
    message: str


class Check(BaseModel):
    kind: Kind | None
    rows: int
    neurons: int
    errors: Annotated[list[Problem], Field(description="the first 100")]
    error_count: int
    warnings: list[Problem]
    warning_count: int
    seconds: Annotated[float | None, Field(description="estimated time of the job")]


class Refused(Detail):
    """An error for a submitted job; `check` is set if rows are wrong."""

    check: Check | None = None


class Links(BaseModel):
    csv: str
    feather: str
    report: str
    neuroglancer: Annotated[
        str | None, Field(description="address on another site; null in a list of jobs")
    ]


class Job(BaseModel):
    id: str
    name: str
    model: str
    source: str
    kind: Kind
    state: State
    stage: str
    done: int
    total: int
    eta_seconds: float | None
    ahead: Annotated[
        int, Field(description="number of jobs in the queue before this job")
    ]
    rows: int
    message: str | None
    created: str
    started: str | None
    finished: str | None
    answer: Annotated[
        dict[str, Any] | None, Field(description="the content of answer.json")
    ]
    links: Links | None
    bytes: int


class Jobs(BaseModel):
    jobs: list[Job]


class Neuron(BaseModel):
    neuron_id: str
    synapses: int
    predicted: int
    called: Annotated[
        str | None, Field(description="the class of most of its synapses")
    ]
    counts: dict[str, int]
    uncertain: bool


class Neurons(BaseModel):
    total: int
    neurons: list[Neuron]


class Synapse(BaseModel):
    position_id: str
    neuron_id: str | None
    x: Annotated[float | None, Field(description="in nm, in the volume frame")]
    y: float | None
    z: float | None
    status: str
    called: str | None
    probabilities: dict[str, float | None]


class Synapses(BaseModel):
    total: int
    rows: list[Synapse]


class Point(BaseModel):
    connector_id: str | None
    neurotransmitter_name: str | None
    probabilities: dict[str, float] | None
    status: str
    model: str


_MEANINGS = {
    400: "a header is not valid, or the body cannot be read",
    401: "the request has no valid token or session",
    403: "the header X-CSRF-Token is missing, or another site sent the request",
    404: "you have nothing with this name or id",
    408: "the body arrived too slowly",
    409: "the job is in a state that does not allow this",
    413: "the body is too large",
    415: "the body has the wrong content type",
    422: "a parameter or a row is not valid",
    429: "a limit of the token is reached",
    503: "the service cannot answer now; try again later",
}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Returns the error answers of a route, for `responses=`; 400 is always added."""
    waits = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
    return {
        code: {"model": Detail, "description": _MEANINGS[code]}
        | ({"headers": waits} if code in (429, 503) else {})
        for code in sorted({400, *codes})
    }
