"""Tasks: they make a sample of a raw record. A dataset class inherits one storage and one task."""

from ailab.datasets.tasks.classification import ClassificationTask, RegressionTask
from ailab.datasets.tasks.graph import GraphTask
from ailab.datasets.tasks.objects import DetectionTask, InstanceSegmentationTask, KeypointTask
from ailab.datasets.tasks.segmentation import PanopticTask, SegmentationTask, read_label_map
from ailab.datasets.tasks.sequences import (
    AudioClassificationTask,
    SpeechRecognitionTask,
    TimeSeriesTask,
    VideoClassificationTask,
)
from ailab.datasets.tasks.task import Task
from ailab.datasets.tasks.text import Seq2SeqTask, TextClassificationTask

__all__ = [
    "AudioClassificationTask",
    "ClassificationTask",
    "DetectionTask",
    "GraphTask",
    "InstanceSegmentationTask",
    "KeypointTask",
    "PanopticTask",
    "RegressionTask",
    "SegmentationTask",
    "Seq2SeqTask",
    "SpeechRecognitionTask",
    "Task",
    "TextClassificationTask",
    "TimeSeriesTask",
    "VideoClassificationTask",
    "read_label_map",
]
