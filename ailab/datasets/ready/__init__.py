"""Ready-made datasets. Each is a storage and a task, registered by name."""

from ailab.datasets.ready.audio import AudioClassificationDataset
from ailab.datasets.ready.coco import COCODataset, COCOSegmentationDataset
from ailab.datasets.ready.image_classification import ClassificationImageDataset
from ailab.datasets.ready.masked_image import MAEAnnFileDataset, MaskingGenerator
from ailab.datasets.ready.split import SplitDataset
from ailab.datasets.ready.voc import VOC_CLASSES, VOCDataset, VOCSegmentationDataset
from ailab.datasets.ready.windows import TextWindows, WindowedTimeSeries
from ailab.datasets.ready.wrapped import WrappedDataset

__all__ = [
    "VOC_CLASSES",
    "AudioClassificationDataset",
    "COCODataset",
    "COCOSegmentationDataset",
    "ClassificationImageDataset",
    "MAEAnnFileDataset",
    "MaskingGenerator",
    "SplitDataset",
    "TextWindows",
    "VOCDataset",
    "VOCSegmentationDataset",
    "WindowedTimeSeries",
    "WrappedDataset",
]
