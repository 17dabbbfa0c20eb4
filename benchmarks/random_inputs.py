# SPDX-License-Identifier: Apache-2.0
"""Random volumes, synapses and networks to time predictions with.

What is made stays in the benchmark's folder and is found there by the next run.
"""

import hashlib
import pathlib
import shutil
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
from scipy import ndimage

from synister_jax import checkpoint, inference, model, volumes


def volume_path(
    folder: pathlib.Path, shape: Sequence[int], config: ml_collections.ConfigDict
) -> pathlib.Path:
    """An N5 volume (gzip, chunks of 16×128×128) of smooth noise."""
    path = folder / f"noise-{'x'.join(map(str, shape))}.n5"
    if path.exists():
        return path
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    smooth = ndimage.gaussian_filter(values, (1, 3, 3))
    noise = np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    volumes.write_n5(partial, noise, config.voxel_size_nm_zyx)
    return partial.rename(path)


def synapses(
    volume: volumes.Volume, config: ml_collections.ConfigDict, count: int
) -> pa.RecordBatch:
    """Uniformly random ones whose crops lie inside."""
    rng = np.random.default_rng(0)
    most = np.subtract(volume.shape_zyx, config.crop_shape_zyx)
    starts = rng.integers(0, most, (count, 3), endpoint=True)
    centres = starts + np.asarray(config.crop_shape_zyx) // 2
    z, y, x = (centres * volume.voxel_size_nm_zyx + volume.offset_nm_zyx).T
    ids = np.arange(len(starts))
    names = ["synapse_id", "z_nm", "y_nm", "x_nm"]
    return pa.RecordBatch.from_arrays(list(map(pa.array, (ids, z, y, x))), names)


def workdir(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    name: str = "run",
    make: Callable[[], inference.Variables] | None = None,
) -> pathlib.Path:
    """A run of this configuration with weights that nobody trained.

    Args:
      name: of the weights.
      make: returns them; else they are those that training starts with.
    """
    digest = hashlib.sha256(config.to_json_best_effort().encode()).hexdigest()
    path = folder / f"{name}-{digest[:12]}"
    if not checkpoint.steps(path):
        variables = make() if make else _initial(config)
        checkpoint.save_imported(path, 0, variables, config)
    return path


def _initial(config: ml_collections.ConfigDict) -> inference.Variables:
    crops = jnp.zeros((1, *config.crop_shape_zyx), jnp.float32)
    network = model.from_config(config)
    init = jax.jit(
        lambda key: network.init(key, crops, train=False),
        compiler_options={"xla_backend_optimization_level": 1},
    )
    return init(jax.random.key(0))
