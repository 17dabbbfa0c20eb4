# SPDX-License-Identifier: Apache-2.0
"""The content of answer.json: the request, the source and the results."""

from typing import TypedDict

REQUEST = "request.json"  # the file of an answer folder that describes the request


class AnsweringModel(TypedDict):
    """The network that made the predictions."""

    workdir: str  # the name of the run's folder
    step: int


class AnswerRecord(TypedDict):
    """The content of answer.json.

    This file is written last. A folder that has the file is therefore complete.
    """

    kind: str  # neurons or positions
    source: str
    source_title: str
    asked_of: dict[str, str]  # server, data set, version, if the source has them
    asked: int  # the number of neurons or positions of the request
    unknown_neurons: list[str]
    neurons_without_synapses: list[str]
    rows: int
    status: dict[str, int]  # the number of rows with each status
    classes: list[str]
    model: AnsweringModel
    volume: str
    temperature: float | None
    warnings: list[str]
    written_by: str
