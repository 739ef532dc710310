"""Models by name."""

from ailab.models.convnet import ConvNet
from ailab.models.mlp import MLP

__all__ = ["MLP", "ConvNet"]
