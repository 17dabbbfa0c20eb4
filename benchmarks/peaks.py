# SPDX-License-Identifier: Apache-2.0
"""Computes the arithmetic work of a network, and the highest rates of the device.

The work is the number of multiplications and additions in the convolutions and dense
layers of the model. A program can execute more or fewer operations. Norms, ReLU,
pooling and softmax are left out. They are less than 2 % of the work of the published
network.
"""

import concurrent.futures
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from synister_jax.base.errors import UserError
from synister_jax.network import inference

# The TFLOP/s of tensor cores without sparsity: in bfloat16, and in TF32, which
# multiplies float32 by default. The source is the data sheet of each product by NVIDIA.
# Numbers with sparsity are halved here. The key is the beginning of `device_kind` in
# JAX, and the first match is used.
_TFLOPS = {
    "NVIDIA H200": (989.4, 494.7),
    "NVIDIA H100 PCIe": (756.0, 378.0),
    "NVIDIA H100 NVL": (835.0, 417.5),
    "NVIDIA H100": (989.4, 494.7),  # SXM
    "NVIDIA A100": (312.0, 156.0),
    "NVIDIA L40S": (362.0, 183.0),
    "NVIDIA L4": (121.0, 60.0),
    "NVIDIA A10": (125.0, 62.5),
}
_SIDE = 2048  # rows and columns of the matrices


def flops_per_crop(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the work of the network for one crop.

    The work of a training step is three times the work of the forward pass.

    Returns:
      {"layers": [{"name", "input", "kernel", "flops", "bytes"}, …], "forward",
      "train"}. "input" and "kernel" are shapes. "forward" and "train" are FLOP. "bytes"
      is the least number of bytes that a layer must move in `config.compute_dtype`:
      its input, its output, and its weights divided by the batch size.

    Raises:
      UserError: the network is not VGG3D.
    """
    if config.model.get("network", "vgg3d") != "vgg3d":
        raise UserError(f"config.model.network = {config.model.network}: use vgg3d")
    item = jnp.dtype(config.compute_dtype).itemsize
    layers = []

    def add(name: str, positions: Sequence[int], *kernel: int) -> None:
        *_, inputs, outputs = kernel
        places, weights = math.prod(positions), math.prod(kernel)
        moved = places * (inputs + outputs) + weights / config.batch_size
        shapes = {"input": (*positions, inputs), "kernel": kernel}
        work = {"flops": 2 * weights * places, "bytes": moved * item}
        layers.append({"name": name} | shapes | work)

    settings = config.model
    shape, channels, features = list(config.crop_shape_zyx), 1, settings.features
    for level, factors in enumerate(settings.downsample_factors):
        for i in range(settings.convolutions[level]):
            add(f"level{level}_conv{i}", shape, 3, 3, 3, channels, features)
            channels = features
        shape = [size // factor for size, factor in zip(shape, factors, strict=True)]
        features *= settings.feature_multipliers[level]
    dense = settings.dense_features
    add("dense0", (), channels * math.prod(shape), dense)
    add("dense1", (), dense, dense)
    add("logits", (), dense, len(config.classes))
    forward = sum(layer["flops"] for layer in layers)
    return {"layers": layers, "forward": forward, "train": 3 * forward}


def parameters(config: ml_collections.ConfigDict) -> int:
    """Returns the number of parameters of the network."""
    leaves = jax.tree.leaves(inference.abstract_variables(config)["params"])
    return sum(math.prod(leaf.shape) for leaf in leaves)


@functools.cache
def peak_flops(dtype: str = "float32") -> tuple[float, str]:
    """Returns the highest FLOP/s of one device, and the source of this number.

    The number for a known GPU is from its data sheet. For other devices, the product of
    two 2048 × 2048 matrices is measured in JAX. On a CPU it is also measured in
    PyTorch, if this is installed, and the faster product is used.
    """
    kind = jax.devices()[0].device_kind
    for name, (bfloat16, tf32) in _TFLOPS.items():
        if kind.startswith(name):
            value = bfloat16 if dtype == "bfloat16" else tf32
            unit = "bfloat16" if dtype == "bfloat16" else "TF32"
            return value * 1e12, f"data sheet of {name}, dense {unit}"
    products = {"jax": _jax_product(dtype)}
    if jax.default_backend() == "cpu" and importlib.util.find_spec("torch"):
        products["torch"] = _torch_product(dtype)
    seconds = {name: _seconds(run) for name, run in products.items()}
    best = min(seconds, key=seconds.__getitem__)
    source = f"measured: {dtype} product of {_SIDE}² matrices, {best}"
    return 2 * _SIDE**3 / seconds[best], source


def memory_bandwidth() -> float:
    """Returns the bytes per second of a copy that is larger than any cache.

    The bytes that are read and the bytes that are written both count.
    """
    if jax.default_backend() != "cpu":
        source = jnp.ones(1 << 28, jnp.float32)
        copy = jax.jit(lambda x: x + 1)
        return 2 * source.nbytes / _seconds(lambda: copy(source).block_until_ready())
    threads = len(os.sched_getaffinity(0))
    source = np.ones((threads, 1 << 26), np.float32)
    target = np.zeros_like(source)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        # NumPy copies without the interpreter lock, so the threads run in parallel.
        seconds = _seconds(lambda: list(pool.map(np.copyto, target, source)))
    return 2 * source.nbytes / seconds


def utilisation(rates: Mapping[str, float], flops: float, dtype: str) -> dict[str, Any]:
    """Returns the GFLOP/s of each side, and their shares of the peak.

    Args:
      rates: the crops per second of each side.
      flops: the FLOP of one crop.
      dtype: float32 or bfloat16.
    """
    peak, source = peak_flops(dtype)
    peak *= jax.device_count()
    return {
        "gflop_per_crop": flops / 1e9,
        "gflops": {name: rate * flops / 1e9 for name, rate in rates.items()},
        "share_of_peak": {name: rate * flops / peak for name, rate in rates.items()},
        "peak_gflops": peak / 1e9,
        "peak_is": source,
    }


def _jax_product(dtype: str) -> Callable[[], Any]:
    matrix = jnp.full((_SIDE, _SIDE), 0.5, dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(matrix, matrix).block_until_ready()


def _torch_product(dtype: str) -> Callable[[], Any]:
    import torch

    matrix = torch.full((_SIDE, _SIDE), 0.5, dtype=getattr(torch, dtype))
    return lambda: matrix @ matrix


def _seconds(run: Callable[[], Any]) -> float:
    """Returns the seconds of the fastest of five runs, after one warm-up run."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])
