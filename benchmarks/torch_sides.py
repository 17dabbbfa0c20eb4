# SPDX-License-Identifier: Apache-2.0
"""The PyTorch sides: the published network as the original runs it, and tuned.

Facts of the original are those of its train_pipeline.py and predict_pipeline.py. The
sides run on a GPU if this PyTorch can use it. Where `config.compute_dtype` is bfloat16
every side runs under autocast to it, the originals' too, which do not do so themselves:
else arithmetic would be compared, not programs.
"""

import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np
import torch
import torch._inductor.config

from benchmarks import made_inputs, side_by_side
from synister_jax.base.errors import UserError
from synister_jax.network import torch_weights
from tests.helpers import torch_networks

Predict = Callable[[np.ndarray], np.ndarray]  # uint8 [n, z, y, x] → probabilities
Step = Callable[[], float]  # one update → its loss
_Program = Callable[[torch.Tensor], torch.Tensor]


def _device() -> torch.device:
    """Takes as many threads as there are CPUs, and TF32 on a GPU, as JAX does."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _network(config: ml_collections.ConfigDict) -> torch_networks.Vgg3D:
    """Makes the network of a config; its weights are the same in every process."""
    if config.model.get("network", "vgg3d") != "vgg3d":
        raise UserError(f"config.model.network = {config.model.network}: only vgg3d")
    torch.manual_seed(0)  # `randomise` leaves the biases as they are
    network = torch_networks.Vgg3D.of(config)
    torch_networks.randomise(network)
    # Logits of a size at which probabilities tell whether two networks agree.
    with torch.no_grad():
        crop = torch.rand(1, 1, *config.crop_shape_zyx) * 2 - 1
        deviation = network.eval()(crop).std().item()
        network.classifier[-1].weight /= 2 ** round(math.log2(deviation))
    return network


def make_run(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes a run of ours with the weights that all sides have."""

    def variables() -> Any:
        state = _network(config).state_dict()
        arrays = {name: value.numpy() for name, value in state.items()}
        return torch_weights.vgg3d(arrays, config)

    made_inputs.run(folder, config, "torch-run", variables)


def _autocast(
    config: ml_collections.ConfigDict, device: torch.device
) -> Callable[[], Any]:
    enabled = config.compute_dtype == "bfloat16"
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def predict(
    name: str, config: ml_collections.ConfigDict, crops: np.ndarray
) -> tuple[Predict, dict[str, Any]]:
    """Makes a side that predicts, and says what is to be said of it.

    as_written: the original scales with NumPy, puts the network into its mode for
    evaluation, but keeps what a gradient would need. inference_mode: without that.
    tuned: scales on the device; batch norms folded into the convolutions; channels
    last; under torch.compile, and on a CPU the convolutions of one crop at a time as
    ours has them there, each where that is faster.

    Args:
      crops: A batch, to compile for and to see what is faster.
    """
    device = _device()
    network = _network(config).eval()
    autocast = _autocast(config, device)
    if name == "tuned":
        return _tuned_predict(network, device, autocast, crops)
    network.to(device)

    def as_written(crops: np.ndarray) -> np.ndarray:
        scaled = crops.astype(np.float32) / 255 * 2 - 1
        with autocast():
            logits = network(torch.as_tensor(scaled[:, None], device=device))
            found = torch.softmax(logits.float(), dim=1)
        return found.detach().cpu().numpy()

    about = {"torch_device": str(device), "compiled": False}
    if name == "inference_mode":
        return torch.inference_mode()(as_written), about
    return as_written, about


def _tuned_predict(
    network: torch_networks.Vgg3D,
    device: torch.device,
    autocast: Callable[[], Any],
    crops: np.ndarray,
) -> tuple[Predict, dict[str, Any]]:
    network.features = _folded(network.features)
    network.to(device, memory_format=torch.channels_last_3d)

    def features(crops: torch.Tensor) -> torch.Tensor:
        scaled = (crops.float() / 255 * 2 - 1)[:, None]
        scaled = scaled.contiguous(memory_format=torch.channels_last_3d)
        return network.features(scaled).flatten(1)

    def head(features: torch.Tensor) -> torch.Tensor:
        return torch.softmax(network.classifier(features).float(), dim=1)

    def forward(crops: torch.Tensor) -> torch.Tensor:
        return head(features(crops))

    def by_crop(features: _Program) -> _Program:
        return lambda crops: head(torch.cat([features(c) for c in crops.split(1)]))

    def with_program(program: _Program) -> Predict:
        @torch.inference_mode()
        def run(crops: np.ndarray) -> np.ndarray:
            with autocast():
                return program(torch.as_tensor(crops, device=device)).cpu().numpy()

        return run

    # Weights as constants: they are laid out for the kernels once. Not as an option of
    # compile: what traces the network reads the setting itself.
    torch._inductor.config.freezing = True
    programs = {"eager": forward, "compiled": torch.compile(forward)}
    if device.type == "cpu":
        programs["crop by crop"] = by_crop(features)
        programs["crop by crop, compiled"] = by_crop(torch.compile(features))
    runs = {name: with_program(program) for name, program in programs.items()}
    best, about = _fastest(runs, lambda run: run(crops))
    return runs[best], {"torch_device": str(device)} | about


def _folded(features: torch.nn.Sequential) -> torch.nn.Sequential:
    """Makes one of every convolution and the batch norm that follows it."""
    layers: list[torch.nn.Module] = []
    for layer in features:
        if isinstance(layer, torch.nn.BatchNorm3d):
            layers[-1] = torch.nn.utils.fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return torch.nn.Sequential(*layers)


def train(
    name: str, config: ml_collections.ConfigDict, crops: np.ndarray, labels: np.ndarray
) -> tuple[Step, dict[str, Any]]:
    """Makes a side that trains, and says what is to be said of it.

    as_written: the crops come from NumPy each step, Adam has its default form, and
    the loss is read each step. tuned: the batch lies on the device, channels last;
    Adam is one fused kernel; torch.compile where that is faster.

    Args:
      crops: Scaled crops, float32 [batch, z, y, x].
    """
    device, is_tuned = _device(), name == "tuned"
    torch.manual_seed(0)  # of dropout
    network = _network(config).train().to(device)
    if is_tuned:
        network.to(memory_format=torch.channels_last_3d)
    autocast = _autocast(config, device)
    cross_entropy = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.learning_rate, fused=is_tuned or None
    )

    def on_device() -> tuple[torch.Tensor, torch.Tensor]:
        batch = torch.as_tensor(crops[:, None], device=device)
        return batch, torch.as_tensor(labels, device=device)

    placed, target = on_device()
    placed = placed.contiguous(memory_format=torch.channels_last_3d)

    def with_program(program: _Program) -> Step:
        def step() -> float:
            batch, labels = (placed, target) if is_tuned else on_device()
            optimizer.zero_grad()
            with autocast():
                loss = cross_entropy(program(batch), labels)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    steps = {"eager": with_program(network)}
    about = {"torch_device": str(device), "compiled": False}
    about["first_losses"] = [steps["eager"](), steps["eager"]()]
    if not is_tuned:
        return steps["eager"], about
    steps["compiled"] = with_program(torch.compile(network))
    best, found = _fastest(steps, lambda step: step())
    return steps[best], about | found


def _fastest(
    programs: Mapping[str, Callable], run: Callable[[Callable], Any]
) -> tuple[str, dict[str, Any]]:
    """Names the fastest program, of those with "compiled" in it where they work here.

    Each runs twice to warm up, then they take turns: the best median of three.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, program in programs.items():
        try:
            run(program)
            times[name] = []
        # No C++ compiler, or one that fails; whatever it is, PyTorch runs without.
        except Exception as error:
            if "compiled" not in name:
                raise
            failed[name] = type(error).__name__
    for index, name in side_by_side.in_turns(list(times), 3):
        start = time.perf_counter()
        run(programs[name])
        if index >= 0:
            times[name].append(time.perf_counter() - start)
    seconds = side_by_side.medians(times)
    print(f"tuned: {seconds} {failed or ''}", file=sys.stderr, flush=True)
    best = min(seconds, key=seconds.__getitem__)
    about = {"variant": best, "compiled": "compiled" in best}
    return best, about | {"seconds_of_a_batch": seconds, "failed": failed}
