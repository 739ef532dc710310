"""Models by name."""

from ailab.models.convnet import ConvNet
from ailab.models.mlp import MLP
from ailab.models.resnet import ResNet
from ailab.models.vit import ViT

__all__ = ["MLP", "ConvNet", "ResNet", "ViT"]
