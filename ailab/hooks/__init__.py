"""Hooks by name, one idea a file; each a builder that returns one `Middleware` or several."""

from ailab.hooks.accumulate import GradAccumulateHook as GradAccumulateHook
from ailab.hooks.amp import AMPHook as AMPHook
from ailab.hooks.augment import AugmentHook as AugmentHook
from ailab.hooks.checkpoint import CheckpointHook as CheckpointHook
from ailab.hooks.checkpoint import ResumeHook as ResumeHook
from ailab.hooks.clip import GradClipHook as GradClipHook
from ailab.hooks.ddp import DDPHook as DDPHook
from ailab.hooks.early_stop import EarlyStopHook as EarlyStopHook
from ailab.hooks.ema import EMAHook as EMAHook
from ailab.hooks.log import LoggerHook as LoggerHook
from ailab.hooks.lr import LrSchedulerHook as LrSchedulerHook
from ailab.hooks.metrics import MetricHook as MetricHook
from ailab.hooks.nonfinite import SkipNonFiniteHook as SkipNonFiniteHook
from ailab.hooks.profiler import ProfilerHook as ProfilerHook
from ailab.hooks.tensorboard import TensorboardHook as TensorboardHook
from ailab.hooks.throughput import ThroughputHook as ThroughputHook
from ailab.hooks.wandb import WandbHook as WandbHook
