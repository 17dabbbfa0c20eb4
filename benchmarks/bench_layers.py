# SPDX-License-Identifier: Apache-2.0
r"""Measures the rate of each layer of the network, and the limits of the machine.

    python -m benchmarks.bench_layers --folder=FOLDER --config=configs/skeleton.py \
        --rounds=5 --batches=2

A layer is one compiled function: a convolution or a matrix product, with bias and ReLU.
Its input is random and has the size that it has in the network, for a batch of
`--config.batch_size` crops. If inference computes one crop at a time on this device,
this program does so, too. Norms and pooling are not measured. The layers run in turns
on one device.

The intensity of a layer is the number of operations per byte that the layer must move
(peaks.flops_per_crop): input, output and weights, each once. The roof is the smaller of
two numbers: the peak rate, and the intensity times the memory bandwidth. No layer alone
can be faster than its roof. run_all.py draws the roofline.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from benchmarks import command_line, peaks, side_by_side
from synister_jax.base import command
from synister_jax.network import convolution

_BATCHES = command_line.define_count("batches", 2, "Compute this many batches a round.")


def main() -> None:
    config = command_line.CONFIG.value
    command_line.keep_compiled()
    work = peaks.flops_per_crop(config)
    peak, peak_is = peaks.peak_flops(config.compute_dtype)
    bandwidth = peaks.memory_bandwidth()
    sides = {layer["name"]: _round(config, layer) for layer in work["layers"]}
    rates = side_by_side.alternate(sides, command_line.ROUNDS.value)
    medians = side_by_side.medians(rates)
    # The roof is the best that the machine can do. So the limits are measured twice, at
    # two times, and the better numbers are used.
    peaks.peak_flops.cache_clear()
    peak, peak_is = max((peak, peak_is), peaks.peak_flops(config.compute_dtype))
    bandwidth = max(bandwidth, peaks.memory_bandwidth())
    layers = []
    for layer in work["layers"]:
        flops, intensity = layer["flops"], layer["flops"] / layer["bytes"]
        rate = medians[layer["name"]] * flops
        layers.append(
            {
                "name": layer["name"],
                "gflop_per_crop": flops / 1e9,
                "mb_per_crop": layer["bytes"] / 1e6,
                "flop_per_byte": intensity,
                "gflops": rate / 1e9,
                "share_of_roof": rate / min(peak, intensity * bandwidth),
                "seconds_per_crop": 1 / medians[layer["name"]],
            }
        )
    report = {
        "layers": layers,
        "gflop_per_crop": work["forward"] / 1e9,
        "flop_per_byte": work["forward"]
        / sum(each["bytes"] for each in work["layers"]),
        "seconds_per_crop": sum(layer["seconds_per_crop"] for layer in layers),
        "peak_gflops": peak / 1e9,
        "peak_is": peak_is,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "batches": _BATCHES.value,
    }
    command_line.print_report("layers", "s/crop", report, config)


def _convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    def convolve(x: jax.Array) -> jax.Array:
        return convolution.conv3d_relu(x, kernel, bias)

    if convolution.calls_library(x.dtype):
        return jax.lax.map(lambda crop: convolve(crop[None])[0], x)
    return convolve(x)


def _dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ kernel + bias)


def _round(
    config: ml_collections.ConfigDict, layer: dict[str, Any]
) -> Callable[[], float]:
    dtype, shape = jnp.dtype(config.compute_dtype), layer["kernel"]
    function = _convolution if len(shape) == 5 else _dense
    jitted = jax.jit(function, compiler_options=convolution.compiler_options())
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(keys[0], (config.batch_size, *layer["input"]), dtype)
    reach = 1 / math.sqrt(math.prod(shape[:-1]))
    kernel = jax.random.uniform(keys[1], shape, dtype, -reach, reach)
    bias = jax.random.uniform(keys[2], shape[-1:], dtype)

    return side_by_side.rate(
        lambda: jitted(x, kernel, bias), len(x), _BATCHES.value, jax.block_until_ready
    )


if __name__ == "__main__":
    command.run(main)
