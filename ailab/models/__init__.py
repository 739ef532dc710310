"""Models by name."""

from ailab.models.convnet import ConvNet
from ailab.models.mlp import MLP
from ailab.models.resnet import ResNet

__all__ = ["MLP", "ConvNet", "ResNet"]
