"""Datasets and batch transforms by name, and the stream that makes batches of them.

Any object with `__len__` and `__getitem__` is a dataset. For files there are storages and tasks. A storage knows where the records
are: `FolderPerClassDataset`, `FileAnnotationDataset` (txt, JSON, JSONL, CSV), `TableAnnotationDataset`, `CocoAnnotationDataset`,
`VocAnnotationDataset`, `ListDataset`, `StreamDataset`. A task knows the fields of a sample: classification, regression, detection,
segmentation, keypoints, video, audio, speech, text, sequences, graphs. A class that inherits from one of each is a dataset:

    from ailab.datasets import ClassificationTask, FolderPerClassDataset, read_image
    from ailab.registry import DATASETS


    @DATASETS.register_module()
    class Leaves(FolderPerClassDataset, ClassificationTask):
        '''One folder of pictures per species.'''

        def load_input(self, raw):
            return read_image(raw[0])

        def load_label(self, raw):
            return raw[1]

Ready-made datasets stand on these: `ClassificationImageDataset`, `COCODataset`, `VOCDataset`, `MAEAnnFileDataset`,
`WindowedTimeSeries`, `AudioClassificationDataset`, `TextWindows` and others. Annotations are checked before training, and a message
has the file and the row: `data.jsonl, line 7, 'label': unknown class 'dgo'. Did you mean 'dog'?`

`collate_fn=dict(type="PadCollate", max_size=dict(boxes=100, labels=100))` brings targets of different sizes to one shape, and so to
one graph. `sampler=dict(type="ClassBalancedSampler")` decides what comes when; there are weighted, curriculum and by-length ones.
A bad sample is replaced within its batch; more than `data.max_bad_frac` of them end the run. `data.cache="ram"` or `"disk"` keeps
decoded pictures, and `size_hint` decodes large JPEGs at a fraction of their size.
"""

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.audio import read_audio
from ailab.datasets.files.image import BadFile, read_image
from ailab.datasets.files.video import read_frames
from ailab.datasets.files.vocabulary import ByteVocabulary, CharVocabulary
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
from ailab.datasets.ready.digits import Digits
from ailab.datasets.ready.fashion_mnist import FashionMNIST
from ailab.datasets.storages.coco import CocoAnnotationDataset
from ailab.datasets.storages.file_annotation import FileAnnotationDataset
from ailab.datasets.storages.folder import FolderPerClassDataset
from ailab.datasets.storages.sequence import ListDataset, StreamDataset
from ailab.datasets.storages.table import TableAnnotationDataset, TableDataset
from ailab.datasets.storages.voc import VocAnnotationDataset
from ailab.datasets.stream.collate import MultiScaleCollate, PadCollate, SegmentationCollate
from ailab.datasets.stream.sampling import ClassBalancedSampler, CurriculumSampler, LengthSampler, WeightedSampler
from ailab.datasets.stream.stream import Stream
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
from ailab.datasets.transforms.augment import (
    BatchAffine,
    BatchCrop,
    BatchErase,
    BatchFlip,
    BatchJitter,
    BatchNormalize,
    BatchResizedCrop,
    BatchShift,
)
from ailab.datasets.transforms.geometry import KeypointFlip, LetterBox, Mosaic
from ailab.datasets.transforms.pipeline import build_transform

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
