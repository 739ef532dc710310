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
from ailab.hooks.freeze import FreezeHook as FreezeHook
from ailab.hooks.grad_stats import GradStatsHook as GradStatsHook
from ailab.hooks.label_smoothing import LabelSmoothingHook as LabelSmoothingHook
from ailab.hooks.log import LoggerHook as LoggerHook
from ailab.hooks.lookahead import LookaheadHook as LookaheadHook
from ailab.hooks.lr import LrSchedulerHook as LrSchedulerHook
from ailab.hooks.metrics import MetricHook as MetricHook
from ailab.hooks.mixing import CutMixHook as CutMixHook
from ailab.hooks.mixing import MixupHook as MixupHook
from ailab.hooks.nonfinite import SkipNonFiniteHook as SkipNonFiniteHook
from ailab.hooks.remat import RematHook as RematHook
from ailab.hooks.sam import SAMHook as SAMHook
from ailab.hooks.spike import SpikeHook as SpikeHook
from ailab.hooks.swa import SWAHook as SWAHook
from ailab.hooks.sync_batchnorm import SyncBatchNormHook as SyncBatchNormHook
from ailab.hooks.tensorboard import TensorboardHook as TensorboardHook
from ailab.hooks.wandb import WandbHook as WandbHook
