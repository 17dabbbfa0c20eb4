# SPDX-License-Identifier: Apache-2.0
"""The options of a prediction. Importing this module is fast."""

import dataclasses

# A unit is written as a whole. If the process is killed, the whole unit is lost. This
# many synapses take seconds on an accelerator, and an hour with the published network
# on two CPU cores. A brain with 100 million synapses has about six thousand units.
UNIT_ROWS = 16_384
MOST_UNIT_ROWS = 1 << 24  # the rows of a unit are held in memory
# The name of the predictions in the output folder, for each value of --format.
FORMATS = {"feather": "predictions.feather", "parquet": "predictions.parquet"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of the flags of `synister_jax.predict`, where they are explained."""

    workdirs: list[str]
    steps: list[str]
    volume: str
    output: str
    synapses: str | None  # if it is None, the region and the step of a grid are given
    split: str
    part: str | None
    roi_nm_zyx: list[str] | None
    step_nm_zyx: list[str] | None
    voxel_size_nm_zyx: list[str] | None
    batch_size: int
    views: int
    calibrated: bool
    unit_rows: int
    units: str | None
    cluster: str | None
    workers: int
    file_format: str
    dry_run: bool
    retry_missing: bool
