# SPDX-License-Identifier: Apache-2.0
"""A prediction in arguments that any process on any machine can open."""

import dataclasses
import functools
import os
import pathlib

from synister_jax.base.errors import UserError
from synister_jax.bulk import execution, planning
from synister_jax.bulk.planning import Plan
from synister_jax.em import volumes
from synister_jax.network import checkpoint, inference, sharding


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that a process on any machine needs to execute units; plain JSON values."""

    members: tuple[tuple[str, int], ...]  # (workdir, step)
    batch_size: int
    views: int
    volume: str
    voxel_size_nm_zyx: tuple[float, ...] | None  # the network's when None
    output: str
    retry_missing: bool
    temperature: float | None = None
    plan: str = ""  # its fingerprint: a worker may outlive it

    def elsewhere(self, plan: Plan) -> "Inputs":
        """For another process: of this plan, and with paths from any folder."""
        members = [(os.path.abspath(workdir), step) for workdir, step in self.members]
        volume = self.volume
        if "://" not in volume and not volume.lstrip().startswith("{"):
            volume = os.path.abspath(volume)
        return dataclasses.replace(
            self,
            members=tuple(members),
            volume=volume,
            output=os.path.abspath(self.output),
            plan=plan.fingerprint.hex(),
        )

    def open(self) -> tuple[inference.Classifier, volumes.Volume]:
        members = [(pathlib.Path(workdir), step) for workdir, step in self.members]
        size = self.voxel_size_nm_zyx
        if size is None:
            size = checkpoint.load_config(members[0][0]).voxel_size_nm_zyx
        volume = volumes.open(self.volume, size)  # first: it is quick, weights are not
        mesh = sharding.make_mesh()
        classifier = inference.Classifier(
            members, self.batch_size, mesh, self.views, self.temperature
        )
        return classifier, volume


@functools.lru_cache(maxsize=1)
def _opened(job: Inputs) -> tuple[Plan, inference.Classifier, volumes.Volume]:
    classifier, volume = job.open()
    plan = planning.open(pathlib.Path(job.output))
    if plan.fingerprint.hex() != job.plan:
        raise UserError(f"{job.output} was planned anew meanwhile; run again")
    here = [member["parameters_sha256"] for member in classifier.members]
    if here != plan.about["parameters_sha256"]:
        raise UserError(f"the checkpoints changed since {job.output} was planned")
    return plan, classifier, volume


def execute_unit(job: Inputs, number: int) -> execution.Times:
    """Writes one part, in a worker process: what is opened stays open for the next."""
    plan, classifier, volume = _opened(job)
    return execution.execute(
        plan, [number], classifier, volume, retry_missing=job.retry_missing
    )
