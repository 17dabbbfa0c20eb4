# SPDX-License-Identifier: Apache-2.0
"""Networks of random weights, and a plain convolution to compare with."""

import jax
import numpy as np
from scipy import ndimage

from synister_jax.network import inference


def reference_convolution(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves x [z, y, x, in] with a kernel [3, 3, 3, in, out] by SciPy."""
    out = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i, o in np.ndindex(*kernel.shape[3:]):
        out[..., o] += ndimage.correlate(x[..., i], kernel[..., i, o], mode="constant")
    return out


def random_variables(config: object) -> dict:
    rng = np.random.default_rng(0)
    abstract = inference.abstract_variables(config)
    # Variances must be positive. All other weights only need a size that keeps the
    # numbers in the network near 1.
    return jax.tree.map(
        lambda a: rng.uniform(0.05, 0.3, a.shape).astype(np.float32), abstract
    )
