"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ailab.registry import MODELS


@MODELS.register_module()
class MLP(nn.Module):
    """Linear layers with ReLU between them: `MLP((64, 128, 10))` has one hidden layer of 128.

    Args:
        sizes: number of features of the input (flattened, without the batch dimension), of each hidden layer, and of the output.
        dropout: probability of dropping a hidden feature.
    """

    def __init__(self, sizes: Sequence[int], dropout: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.ReLU(), nn.Dropout(dropout)] if layers and dropout else [nn.ReLU()] if layers else []
            layers.append(nn.Linear(inputs, outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """(B, ...) of any real dtype -> (B, sizes[-1])."""
        x = input.flatten(1)
        return self.layers(x if x.is_floating_point() else x.float())
