# SPDX-License-Identifier: Apache-2.0
"""What a prediction is asked to do. This module imports nothing that takes long."""

import dataclasses

# A unit is written as a whole, and lost as a whole when the process is killed. So many
# synapses take seconds on an accelerator, and an hour with the published network on
# two CPU cores. A brain of 100 million synapses has some six thousand units.
UNIT_ROWS = 16_384
MOST_UNIT_ROWS = 1 << 24  # the rows of a unit are held in memory
# The name of the answer in the output folder, by the value of --format.
FORMATS = {"feather": "predictions.feather", "parquet": "predictions.parquet"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of the flags of `synister_jax.predict`, which explains them."""

    workdirs: list[str]
    steps: list[str]
    volume: str
    output: str
    synapses: str | None  # this, or the region and the step of a grid
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
