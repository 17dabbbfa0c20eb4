# SPDX-License-Identifier: Apache-2.0
"""The numbers and pictures of a run: metrics.jsonl, TensorBoard events, snapshots."""

import json
import pathlib
import struct
import time
from collections.abc import Mapping

from matplotlib.figure import Figure
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from synister_jax.base import figures, files
from synister_jax.base.errors import UserError


class MetricsLog:
    """Writes numbers and pictures to `metrics.jsonl`, TensorBoard and `snapshots/`.

    A resumed run repeats the steps after its last checkpoint. Their old lines are
    removed first, so that every step is in the files once.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read(workdir) if line["step"] <= first_step]
        files.write_text(self._path, "".join(json.dumps(x) + "\n" for x in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(workdir / "events"))
        # TensorBoard ignores what earlier files say about this step and later ones.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=first_step + 1, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        line = {"step": step} | dict(scalars)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._add_summary(
            step,
            *(
                summary_pb2.Summary.Value(tag=name, simple_value=value)
                for name, value in scalars.items()
            ),
        )

    def write_picture(self, step: int, name: str, picture: Figure) -> None:
        """Writes snapshots/<name>-<step>.png and the same for TensorBoard.

        Closes the figure.
        """
        folder = files.make_folder(self._path.parent / "snapshots")
        content = figures.png(picture)
        files.write_bytes(folder / f"{name}-{step:08d}.png", content)
        width, height = struct.unpack(">II", content[16:24])  # the header of PNG
        image = summary_pb2.Summary.Image(
            width=width, height=height, encoded_image_string=content
        )
        self._add_summary(step, summary_pb2.Summary.Value(tag=name, image=image))

    def _add_summary(self, step: int, *values: summary_pb2.Summary.Value) -> None:
        summary = summary_pb2.Summary(value=values)
        self._add(event_pb2.Event(step=step, summary=summary))

    def _add(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._events.add_event(event)
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl, or none if there is no such file.

    A last line that is cut short is left out.

    Raises:
      UserError: another line is not JSON.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} has a line that is not JSON: {error}") from None
