# SPDX-License-Identifier: Apache-2.0
"""Runs the published network in PyTorch, as the original does and tuned.

The facts about the original are from its train_pipeline.py and predict_pipeline.py. The
sides run on a GPU if PyTorch can use a GPU. If `config.compute_dtype` is bfloat16,
every side uses autocast to bfloat16. The original does not do this itself. But
otherwise the benchmark would compare the arithmetic, and not the programs.
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
    """Returns the device, and sets the number of threads and the precision.

    PyTorch uses one thread per CPU, and TF32 on a GPU, as JAX does.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _network(config: ml_collections.ConfigDict) -> torch_networks.Vgg3D:
    """Returns the network of a config; its weights are the same in every process."""
    if config.model.get("network", "vgg3d") != "vgg3d":
        raise UserError(f"config.model.network = {config.model.network}: use vgg3d")
    torch.manual_seed(0)  # for the biases, which `randomise` does not change
    network = torch_networks.Vgg3D.of(config)
    torch_networks.randomise(network)
    # The logits are scaled. If they were too large or too small, the probabilities
    # would not show whether two networks agree.
    with torch.no_grad():
        crop = torch.rand(1, 1, *config.crop_shape_zyx) * 2 - 1
        deviation = network.eval()(crop).std().item()
        network.classifier[-1].weight /= 2 ** round(math.log2(deviation))
    return network


def make_run(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Writes a run of this project with the weights that all sides have."""

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
    """Returns a side that predicts, and facts about the side for the report.

    - as_written: as in the original, NumPy scales the crops, and the network is in
      evaluation mode, but PyTorch keeps the data for gradients.
    - inference_mode: the same without the data for gradients.
    - tuned: the device scales the crops, batch norms are folded into the convolutions,
      and the channels come last. torch.compile is used if it is faster. On a CPU, the
      convolutions get one crop at a time, as in ours, if this is faster.

    Args:
      name: as_written, inference_mode or tuned.
      config: the config of the network.
      crops: a batch, uint8 [n, z, y, x]. The tuned program is compiled for this batch,
        and the variants are measured with this batch.
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

    # Weights become constants, so that their layout is changed for the kernels only
    # once. This is no option of torch.compile here, because the code that traces the
    # network reads the global setting.
    torch._inductor.config.freezing = True
    programs = {"eager": forward, "compiled": torch.compile(forward)}
    if device.type == "cpu":
        programs["crop by crop"] = by_crop(features)
        programs["crop by crop, compiled"] = by_crop(torch.compile(features))
    runs = {name: with_program(program) for name, program in programs.items()}
    best, about = _fastest(runs, lambda run: run(crops))
    return runs[best], {"torch_device": str(device)} | about


def _folded(features: torch.nn.Sequential) -> torch.nn.Sequential:
    """Returns the layers with each batch norm folded into the convolution before it."""
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
    """Returns a side that trains, and facts about the side for the report.

    - as_written: every step copies the crops from NumPy and reads the loss, and Adam
      has its default form.
    - tuned: the batch is on the device and its channels come last. Adam is one fused
      kernel. torch.compile is used if it is faster.

    Args:
      name: as_written or tuned.
      config: the config of the network and its training.
      crops: scaled crops, float32 [batch, z, y, x].
      labels: class numbers, int64 [batch].
    """
    device, is_tuned = _device(), name == "tuned"
    torch.manual_seed(0)  # for dropout
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
    """Returns the name of the fastest program, and facts about the choice.

    Each program runs twice to warm up. Then the programs run in turns, three times
    each, and the smallest median wins. Compiled programs that fail are left out.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, program in programs.items():
        try:
            run(program)
            times[name] = []
        # torch.compile fails in many ways, for example without a C++ compiler. PyTorch
        # also runs without torch.compile.
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
