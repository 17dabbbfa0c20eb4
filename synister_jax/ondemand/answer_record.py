# SPDX-License-Identifier: Apache-2.0
"""What answer.json says: what was asked, of whom, and what came of it."""

from typing import TypedDict

REQUEST = "request.json"  # in an answer folder: what was asked


class AnsweringModel(TypedDict):
    """The network that answered."""

    workdir: str  # name of the run's folder
    step: int


class AnswerRecord(TypedDict):
    """What answer.json says; it is written last, so an answer that has it is whole."""

    kind: str  # neurons or positions
    source: str
    source_title: str
    asked_of: dict[str, str]  # server, data set, version, as far as the source has them
    asked: int  # how many neurons or positions
    unknown_neurons: list[str]
    neurons_without_synapses: list[str]
    rows: int
    status: dict[str, int]  # rows of each
    classes: list[str]
    model: AnsweringModel
    volume: str
    temperature: float | None
    warnings: list[str]
    written_by: str
