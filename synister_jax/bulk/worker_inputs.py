# SPDX-License-Identifier: Apache-2.0
"""The arguments with which a worker on any machine can compute work units."""

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
    """All that a worker on any machine needs to compute units, as plain JSON values."""

    members: tuple[tuple[str, int], ...]  # (workdir, step)
    batch_size: int
    views: int
    volume: str
    voxel_size_nm_zyx: tuple[float, ...] | None  # None: the size in the run's config
    output: str
    retry_missing: bool
    temperature: float | None = None
    # The fingerprint of the plan. A worker can still run when the plan is replaced.
    plan: str = ""

    def elsewhere(self, plan: Plan) -> "Inputs":
        """Returns the inputs for another process: with the plan and absolute paths."""
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
        """Opens the networks and the volume.

        Raises:
          UserError: the volume or a checkpoint cannot be opened.
        """
        members = [(pathlib.Path(workdir), step) for workdir, step in self.members]
        size = self.voxel_size_nm_zyx
        if size is None:
            size = checkpoint.load_config(members[0][0]).voxel_size_nm_zyx
        volume = volumes.open(self.volume, size)  # quicker than the weights, so first
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
        raise UserError(
            f"{job.output}: the plan was replaced during the run; run the command again"
        )
    here = [member["parameters_sha256"] for member in classifier.members]
    if here != plan.about["parameters_sha256"]:
        raise UserError(
            f"{job.output}: the checkpoints have changed since the plan was made; "
            "choose another --output"
        )
    return plan, classifier, volume


def execute_unit(job: Inputs, number: int) -> execution.Times:
    """Computes one unit in a worker process and writes its result file.

    The networks and the volume stay open for the next unit.

    Raises:
      UserError: the plan or the checkpoints have changed, the volume cannot be read, or
        the file cannot be written.
    """
    plan, classifier, volume = _opened(job)
    return execution.execute(
        plan, [number], classifier, volume, retry_missing=job.retry_missing
    )
