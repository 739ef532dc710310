"""Datasets and batch transforms by name, and the stream that makes batches of them."""

from ailab.datasets.augment import (
    BatchAffine,
    BatchCrop,
    BatchErase,
    BatchFlip,
    BatchJitter,
    BatchNormalize,
    BatchResizedCrop,
    BatchShift,
)
from ailab.datasets.base import LabBaseDataset
from ailab.datasets.digits import Digits
from ailab.datasets.fashion_mnist import FashionMNIST
from ailab.datasets.image import BadFile, read_image
from ailab.datasets.sampling import ClassBalancedSampler, CurriculumSampler, LengthSampler, WeightedSampler
from ailab.datasets.stream import Stream
from ailab.datasets.table import TableAnnotationDataset, TableDataset

__all__ = [
    "BadFile",
    "BatchAffine",
    "BatchCrop",
    "BatchErase",
    "BatchFlip",
    "BatchJitter",
    "BatchNormalize",
    "BatchResizedCrop",
    "BatchShift",
    "ClassBalancedSampler",
    "CurriculumSampler",
    "Digits",
    "FashionMNIST",
    "LabBaseDataset",
    "LengthSampler",
    "Stream",
    "TableAnnotationDataset",
    "TableDataset",
    "WeightedSampler",
    "read_image",
]
