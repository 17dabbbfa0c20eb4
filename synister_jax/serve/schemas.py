# SPDX-License-Identifier: Apache-2.0
"""What the API takes and answers; ids are strings, for JavaScript's numbers are short.

`/openapi.json` is made from these.
"""

from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import BaseModel, Field, StringConstraints

from synister_jax.ondemand.questions import Kind
from synister_jax.serve.records import State

_ID = {"pattern": "^[0-9a-f]{16}$"}
# Told, not enforced: what is no id is not found, as an id that nobody has.
JobId = Annotated[str, Path(json_schema_extra=_ID)]
ModelName = Annotated[str, Query(max_length=64, description="of /api/models")]
SourceName = Annotated[str, Query(max_length=64, description="one of the model's")]
Whole = Annotated[str, StringConstraints(pattern=r"^-?[0-9]{1,19}$")]
Coordinate = Annotated[float, Query(ge=-1e15, le=1e15, allow_inf_nan=False)]
Offset = Annotated[int, Query(ge=0, le=2**40)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Search = Annotated[str, Query(max_length=64, description="digits of an id")]


class Detail(BaseModel):
    """What is wrong, and what to do, in one line."""

    detail: str


class Health(BaseModel):
    status: Literal["ok"]
    workers: int


class Login(BaseModel):
    token: Annotated[str, Field(min_length=1, max_length=200)]


class LoggedIn(BaseModel):
    name: str
    csrf: Annotated[str, Field(description="for the header X-CSRF-Token")]


class Limits(BaseModel):
    rows: int
    jobs: Annotated[int, Field(description="unfinished")]
    bytes: int
    requests_per_minute: int


class Used(BaseModel):
    jobs: int
    bytes: int


class Session(BaseModel):
    name: str
    csrf: Annotated[str | None, Field(description="null: the token itself was shown")]
    limits: Limits
    used: Used


class Class(BaseModel):
    name: str
    short: str
    colour: Annotated[int, Field(description="of the page's palette, 0 to 9")]


class Source(BaseModel):
    name: str
    title: str
    units: str
    neuron: str
    neurons: Annotated[bool, Field(description="neurons can be asked for")]


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
    line: Annotated[int, Field(description="from 1; 0 for the whole")]
    column: Annotated[str, Field(description="empty for the row")]
    message: str


class Check(BaseModel):
    kind: Kind | None
    rows: int
    neurons: int
    errors: Annotated[list[Problem], Field(description="the first 100")]
    error_count: int
    warnings: list[Problem]
    warning_count: int
    seconds: Annotated[float | None, Field(description="that it may take")]


class Refused(Detail):
    """`check` is there when it is the rows that are wrong."""

    check: Check | None = None


class Links(BaseModel):
    csv: str
    feather: str
    report: str
    neuroglancer: Annotated[
        str | None, Field(description="another site; null in a list of jobs")
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
    ahead: Annotated[int, Field(description="jobs that are queued before it")]
    rows: int
    message: str | None
    created: str
    started: str | None
    finished: str | None
    answer: Annotated[dict[str, Any] | None, Field(description="answer.json")]
    links: Links | None
    bytes: int


class Jobs(BaseModel):
    jobs: list[Job]


class Neuron(BaseModel):
    neuron_id: str
    synapses: int
    predicted: int
    called: Annotated[str | None, Field(description="by most of its synapses")]
    counts: dict[str, int]
    uncertain: bool


class Neurons(BaseModel):
    total: int
    neurons: list[Neuron]


class Synapse(BaseModel):
    position_id: str
    neuron_id: str | None
    x: Annotated[float | None, Field(description="nm, the volume's frame")]
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
    400: "the headers cannot be meant, or the body not be read",
    401: "no valid token or session",
    403: "the header X-CSRF-Token is missing, or another site sent the request",
    404: "nothing of yours is there",
    408: "the body came too slowly",
    409: "not in this state",
    413: "too large",
    415: "another type of body",
    422: "a parameter, or a row, cannot be meant",
    429: "a limit of the token is reached",
    503: "not now; try again",
}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The answers that a route may give besides its own, for `responses=`."""
    waits = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
    return {
        code: {"model": Detail, "description": _MEANINGS[code]}
        | ({"headers": waits} if code in (429, 503) else {})
        for code in sorted({400, *codes})
    }
