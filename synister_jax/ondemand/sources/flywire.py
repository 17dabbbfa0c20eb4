# SPDX-License-Identifier: Apache-2.0
"""Gets FlyWire's synapses from CAVE with caveclient, and moves them to FAFB v14.

The rows of CAVE's materialized table are connections. Each connection has an id and a
presynaptic position. A T-bar with several partners therefore has several sites, as in
the published predictions.

FlyWire and FAFB v14 align the sections differently. A service knows the displacement at
every position (flyconnectome/transform_service, app/main.py, `transform_values`). The
service takes and returns voxels of 4 x 4 x 40 nm. Its answers are rounded to whole
voxels, as in funkelab's synistereq. The answers are in CATMAID's frame, which differs
from the frame of the N5 container by one section.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import requests
from caveclient import auth, base, chunkedgraph, infoservice, materializationengine

from synister_jax.base.errors import UserError
from synister_jax.ondemand.sources import SITES, Found, http_session
from synister_jax.ondemand.sources.credentials import SourceSettings

_VOXEL_SIZE_NM = {"x": 4.0, "y": 4.0, "z": 40.0}
# The points of one request to the transform service, as in the original.
_POINTS = 1_000
_BATCH = 20  # root ids for each request
# The largest number of rows of a query. Servers cut answers after 200,000 rows or more
# (QUERY_LIMIT_SIZE of CAVEconnectome/MaterializationEngine). Only a header says that an
# answer is cut.
_MOST_ROWS = 100_000
_COLUMNS = ["id", "pre_pt_root_id", "pre_pt_position"]


class _Info(http_session.OwnSession, infoservice.InfoServiceClient):
    """A client of caveclient with our time-outs and retries, as the two below."""


class _Materialization(
    http_session.OwnSession, materializationengine.MaterializationClient
):
    pass


class _ChunkedGraph(http_session.OwnSession, chunkedgraph.ChunkedGraphClient):
    pass


def presynaptic_sites(
    neuron_ids: Sequence[int], settings: SourceSettings
) -> Iterator[Found]:
    """Implements `sources.presynaptic_sites`. Sites have the order of their ids.

    A root id is known if it was a root id at the time of the materialization.
    """
    cave = _Cave(settings)
    for first in range(0, len(neuron_ids), _BATCH):
        batch = [int(neuron) for neuron in neuron_ids[first : first + _BATCH]]
        sites = cave.sites(batch)
        owner = sites["neuron_id"].to_numpy()
        known = set(owner.tolist())
        known |= cave.roots([neuron for neuron in batch if neuron not in known])
        for neuron in batch:
            yield Found(
                neuron, neuron in known, sites.filter(pa.array(owner == neuron))
            )


def listing(
    settings: SourceSettings, after: int | None
) -> Iterator[tuple[pa.Table, int | None]]:
    """Raises `UserError`, because CAVE cuts long answers and cannot send the rest."""
    raise UserError(
        f"source {settings.source} cannot list a whole volume: CAVE cuts large "
        "answers; convert the published table of all synapses "
        "(https://doi.org/10.5281/zenodo.10676866) to the volume frame, and use it "
        "with --source=none --synapses=TABLE"
    )


def to_fafb(
    coordinates: Mapping[str, np.ndarray], settings: SourceSettings
) -> dict[str, np.ndarray]:
    """Moves positions from FlyWire's frame to the frame of CATMAID's FAFB v14.

    Args:
      coordinates: `x`, `y` and `z` in nm in FlyWire's frame, each [n].
      settings: the settings of the source.

    Returns:
      `x`, `y` and `z` in nm, each [n] float64, rounded to whole voxels. A position is
      NaN if a coordinate is NaN or the service knows no displacement there.

    Raises:
      UserError: the service does not answer, or its answer has not the documented form.
    """
    points = np.stack(
        [np.asarray(coordinates[a], np.float64) / _VOXEL_SIZE_NM[a] for a in "xyz"],
        axis=1,
    )
    result = np.full(points.shape, np.nan)
    asked = np.flatnonzero(np.isfinite(points).all(axis=1))
    url = settings["transform"]
    where = settings.where("transform")
    with http_session.Session("FlyWire's transform service", where, []) as session:
        for first in range(0, len(asked), _POINTS):
            rows = asked[first : first + _POINTS]
            payload = {"locations": points[rows].tolist()}
            answer = session.json("POST", url, json=payload)
            try:
                # A position without a displacement has null values.
                moved = np.array(
                    [[point[axis] for axis in "xyz"] for point in answer], np.float64
                )
            except (TypeError, KeyError, ValueError):
                moved = np.zeros((0, 3))
            if moved.shape != (len(rows), 3):
                raise session.broken(url, "no point for each position that was sent")
            result[rows] = np.rint(moved)
    result[np.isnan(result).any(axis=1)] = np.nan
    return {axis: result[:, i] * _VOXEL_SIZE_NM[axis] for i, axis in enumerate("xyz")}


class _Cave:
    """The services of a datastack, at the addresses that the info service gives."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self._version = _version(settings)
        try:
            self._auth = auth.AuthClient(
                token=settings["token"] or None, server_address=settings["url"]
            )
        except (OSError, ValueError, AttributeError):
            raise UserError(
                "caveclient's own file of tokens is broken; correct the file, or set "
                f"{settings.where('token')}"
            ) from None
        self._cut = False
        self._graph: _ChunkedGraph | None = None
        try:
            self._info = _Info(
                self._session(),
                settings["url"],
                settings["datastack"],
                auth_client=self._auth,
                api_version=2,
            )
            self._materialization = _Materialization(
                self._session(),
                self._info.local_server(),
                settings["datastack"],
                auth_client=self._auth,
                api_version=3,
                version=self._version,
            )
        except _ERRORS as error:
            raise self._broken(error) from None

    def sites(self, roots: list[int]) -> pa.Table:
        """Returns the sites of roots with the columns of `SITES`.

        The rows are sorted by root id, then by synapse id.
        """
        frame = pd.concat(self._rows(roots, {}))
        frame = frame.sort_values(["pre_pt_root_id", "id"])
        arrays = [frame[name].to_numpy(np.int64) for name in _COLUMNS[:2]]
        for axis in "xyz":
            arrays.append(frame[f"pre_pt_position_{axis}"].to_numpy(np.float64))
        return pa.table(arrays, schema=SITES)

    def roots(self, ids: list[int]) -> set[int]:
        """Returns the ids that were root ids at the time of the materialization."""
        if not ids:
            return set()
        try:
            if self._graph is None:
                self._graph = _ChunkedGraph(
                    self._session(),
                    self._info.local_server(),
                    self._info.segmentation_source().split("/")[-1],
                    auth_client=self._auth,
                    api_version=1,
                    timestamp=self._materialization.get_timestamp(self._version),
                )
            latest = self._graph.is_latest_roots(ids)
        except _ERRORS as error:
            raise self._broken(error) from None
        if latest.shape != (len(ids),):
            raise self._broken(ValueError("is_latest"))
        return {root for root, is_root in zip(ids, latest, strict=True) if is_root}

    def _rows(self, roots: list[int], ids: dict[str, int]) -> list[pd.DataFrame]:
        """Returns the rows of the roots with `from` <= id < `below`, in pieces.

        If an answer is cut, the request is split and sent again.
        """
        self._cut = False
        options: dict[str, Any] = {}
        if "from" in ids:
            options["filter_greater_equal_dict"] = {"id": ids["from"]}
        if "below" in ids:
            options["filter_less_dict"] = {"id": ids["below"]}
        try:
            frame = self._materialization.query_table(
                self._settings["table"],
                filter_in_dict={"pre_pt_root_id": roots},
                select_columns=_COLUMNS,
                limit=_MOST_ROWS,
                split_positions=True,
                materialization_version=self._version,
                desired_resolution=[1, 1, 1],
                metadata=False,
                merge_reference=False,
                log_warning=False,
                **options,
            )
            _check(frame, roots)
        except _ERRORS as error:
            raise self._broken(error) from None
        if len(frame) < _MOST_ROWS and not self._cut:
            return [frame]
        if len(roots) > 1:
            half = len(roots) // 2
            return self._rows(roots[:half], ids) + self._rows(roots[half:], ids)
        found = np.unique(frame["id"])
        if len(found) < 2:
            raise self._broken(ValueError("one row"))
        middle = int(found[(len(found) - 1) // 2])
        below, above = ids | {"below": middle + 1}, ids | {"from": middle + 1}
        return self._rows(roots, below) + self._rows(roots, above)

    def _session(self) -> http_session.Session:
        where = f"{self._settings.where('token')}, or save it as caveclient does"
        session = http_session.Session("CAVE", where, [self._auth.token])
        session.hooks["response"].append(self._note)
        return session

    def _note(self, response: requests.Response, **options: Any) -> None:
        self._cut |= "Limited query" in response.headers.get("Warning", "")

    def _broken(self, error: Exception) -> UserError:
        """Returns the error for an answer that caveclient cannot use."""
        session = self._session()
        if isinstance(error, base.ServerIncompatibilityError):
            return session.problem(self._settings["url"], "is too old for caveclient")
        what = f"data that caveclient cannot use ({type(error).__name__})"
        return session.broken(self._settings["url"], what)


# caveclient and pandas raise these errors if an answer has not the documented form.
_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    base.ServerIncompatibilityError,
)


def _check(frame: pd.DataFrame, roots: list[int]) -> None:
    """Raises an error if the frame lacks a column or has a row of another root."""
    for name in ("id", "pre_pt_root_id"):
        if not pd.api.types.is_integer_dtype(frame[name]):
            raise ValueError(name)
    for axis in "xyz":
        frame[f"pre_pt_position_{axis}"].astype(np.float64)
    if not frame["pre_pt_root_id"].isin(roots).all():
        raise ValueError("pre_pt_root_id")


def _version(settings: SourceSettings) -> int:
    try:
        return int(settings["materialization"])
    except ValueError:
        raise UserError(
            f"{settings['materialization']!r} is not the number of a materialization; "
            f"set {settings.where('materialization')}"
        ) from None
