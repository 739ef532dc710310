"""Metrics by name."""

from ailab.metrics.accuracy import Accuracy, Top1Accuracy
from ailab.metrics.image import PSNR, MeanIoU
from ailab.metrics.lab import LabBaseMetric

__all__ = ["PSNR", "Accuracy", "LabBaseMetric", "MeanIoU", "Top1Accuracy"]
