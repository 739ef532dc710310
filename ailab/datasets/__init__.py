"""Datasets and batch transforms by name, and the stream that makes batches of them."""

from ailab.datasets.audio import read_audio
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
from ailab.datasets.coco import CocoAnnotationDataset
from ailab.datasets.collate import MultiScaleCollate, PadCollate, SegmentationCollate
from ailab.datasets.digits import Digits
from ailab.datasets.fashion_mnist import FashionMNIST
from ailab.datasets.file_annotation import FileAnnotationDataset
from ailab.datasets.folder import FolderPerClassDataset
from ailab.datasets.geometry import KeypointFlip, LetterBox, Mosaic
from ailab.datasets.image import BadFile, read_image
from ailab.datasets.listed import ListDataset, StreamDataset
from ailab.datasets.pipeline import build_transform
from ailab.datasets.ready import (
    AudioClassificationDataset,
    ClassificationImageDataset,
    COCODataset,
    COCOSegmentationDataset,
    MAEAnnFileDataset,
    MaskingGenerator,
    SplitDataset,
    TextWindows,
    VOCDataset,
    VOCSegmentationDataset,
    WindowedTimeSeries,
    WrappedDataset,
)
from ailab.datasets.sampling import ClassBalancedSampler, CurriculumSampler, LengthSampler, WeightedSampler
from ailab.datasets.stream import Stream
from ailab.datasets.table import TableAnnotationDataset, TableDataset
from ailab.datasets.tasks import (
    AudioClassificationTask,
    ClassificationTask,
    DetectionTask,
    GraphTask,
    InstanceSegmentationTask,
    KeypointTask,
    PanopticTask,
    RegressionTask,
    SegmentationTask,
    Seq2SeqTask,
    SpeechRecognitionTask,
    Task,
    TextClassificationTask,
    TimeSeriesTask,
    VideoClassificationTask,
    read_label_map,
)
from ailab.datasets.video import read_frames
from ailab.datasets.voc import VocAnnotationDataset
from ailab.datasets.vocabulary import ByteVocabulary, CharVocabulary

__all__ = [
    "AudioClassificationDataset",
    "AudioClassificationTask",
    "BadFile",
    "BatchAffine",
    "BatchCrop",
    "BatchErase",
    "BatchFlip",
    "BatchJitter",
    "BatchNormalize",
    "BatchResizedCrop",
    "BatchShift",
    "ByteVocabulary",
    "COCODataset",
    "COCOSegmentationDataset",
    "CharVocabulary",
    "ClassBalancedSampler",
    "ClassificationImageDataset",
    "ClassificationTask",
    "CocoAnnotationDataset",
    "CurriculumSampler",
    "DetectionTask",
    "Digits",
    "FashionMNIST",
    "FileAnnotationDataset",
    "FolderPerClassDataset",
    "GraphTask",
    "InstanceSegmentationTask",
    "KeypointFlip",
    "KeypointTask",
    "LabBaseDataset",
    "LengthSampler",
    "LetterBox",
    "ListDataset",
    "MAEAnnFileDataset",
    "MaskingGenerator",
    "Mosaic",
    "MultiScaleCollate",
    "PadCollate",
    "PanopticTask",
    "RegressionTask",
    "SegmentationCollate",
    "SegmentationTask",
    "Seq2SeqTask",
    "SpeechRecognitionTask",
    "SplitDataset",
    "Stream",
    "StreamDataset",
    "TableAnnotationDataset",
    "TableDataset",
    "Task",
    "TextClassificationTask",
    "TextWindows",
    "TimeSeriesTask",
    "VOCDataset",
    "VOCSegmentationDataset",
    "VideoClassificationTask",
    "VocAnnotationDataset",
    "WeightedSampler",
    "WindowedTimeSeries",
    "WrappedDataset",
    "build_transform",
    "read_audio",
    "read_frames",
    "read_image",
    "read_label_map",
]
