"""Metrics by name."""

from ailab.metrics.accuracy import Accuracy, Top1Accuracy
from ailab.metrics.lab import LabBaseMetric

__all__ = ["Accuracy", "LabBaseMetric", "Top1Accuracy"]
