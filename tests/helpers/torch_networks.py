# SPDX-License-Identifier: Apache-2.0
"""The published networks in PyTorch, built from their documented layout.

Tests use them as the reference. The parameters have the names that they have in the
checkpoints of the originals.
"""

import math
from collections.abc import Sequence

import ml_collections
import torch
from torch import nn


class Vgg3D(nn.Module):
    """The network of funlib.learn.torch: [batch, 1, z, y, x] → logits."""

    def __init__(
        self,
        crop_shape_zyx: Sequence[int],
        classes: int,
        features: int,
        feature_multipliers: Sequence[int],
        downsample_factors: Sequence[Sequence[int]],
        convolutions: Sequence[int],
        dense_features: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        shape, channels = list(crop_shape_zyx), 1
        for factors, count, multiplier in zip(
            downsample_factors, convolutions, feature_multipliers, strict=True
        ):
            for _ in range(count):
                layers.append(nn.Conv3d(channels, features, 3, padding=1))
                layers.append(nn.BatchNorm3d(features))
                layers.append(nn.ReLU())
                channels = features
            layers.append(nn.MaxPool3d(tuple(factors)))
            shape = [
                size // factor for size, factor in zip(shape, factors, strict=True)
            ]
            features *= multiplier
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * math.prod(shape), dense_features),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(dense_features, dense_features),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(dense_features, classes),
        )

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Vgg3D":
        settings = config.model
        return cls(
            config.crop_shape_zyx,
            len(config.classes),
            settings.features,
            settings.feature_multipliers,
            settings.downsample_factors,
            settings.convolutions,
            settings.dense_features,
            settings.dropout,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class _Block(nn.Module):
    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv3d(channels, features, 3, stride, padding=1, bias=False),
            nn.BatchNorm3d(features),
            nn.ReLU(),
        )
        self.conv2 = nn.Sequential(
            nn.Conv3d(features, features, 3, padding=1, bias=False),
            nn.BatchNorm3d(features),
        )
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv3d(channels, features, 1, stride, bias=False),
                nn.BatchNorm3d(features),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.conv2(self.conv1(x)) + shortcut)


class ResNet18(nn.Module):
    """BANC's r3d_18 with one input channel: [batch, 1, z, x, y] → logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(1, 64, (3, 7, 7), (1, 2, 2), padding=(1, 3, 3), bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(),
        )
        self.layer1 = nn.Sequential(_Block(64, 64, 1), _Block(64, 64, 1))
        self.layer2 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        self.layer3 = nn.Sequential(_Block(128, 256, 2), _Block(256, 256, 1))
        self.layer4 = nn.Sequential(_Block(256, 512, 2), _Block(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(self.avgpool(x).flatten(1))


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Sets weights that keep the signal's size, and statistics as if after training.

    With PyTorch's initial weights, the logits of a deep network would be its last
    biases, whatever the crop.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.3, 0.3, generator=generator)
                module.running_mean.uniform_(-0.3, 0.3, generator=generator)
                module.running_var.uniform_(0.3, 1.2, generator=generator)
            elif isinstance(module, nn.Conv3d | nn.Linear):
                bound = math.sqrt(6 / module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
