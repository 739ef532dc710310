"""Datasets and batch transforms by name, and the stream that makes batches of them."""

from ailab.datasets.augment import BatchAffine, BatchErase, BatchFlip, BatchNormalize, BatchShift
from ailab.datasets.base import LabBaseDataset
from ailab.datasets.digits import Digits
from ailab.datasets.fashion_mnist import FashionMNIST
from ailab.datasets.stream import Stream
from ailab.datasets.table import TableAnnotationDataset, TableDataset

__all__ = [
    "BatchAffine",
    "BatchErase",
    "BatchFlip",
    "BatchNormalize",
    "BatchShift",
    "Digits",
    "FashionMNIST",
    "LabBaseDataset",
    "Stream",
    "TableAnnotationDataset",
    "TableDataset",
]
