"""torch's optimizers as pure `(init, update)` pairs, and torch's learning-rate schedules as tables."""

from ailab.optim.build import build_optimizer as build_optimizer
from ailab.optim.optimizer import Group as Group
from ailab.optim.optimizer import Optimizer as Optimizer
from ailab.optim.optimizer import lrs as lrs
from ailab.optim.optimizer import with_lrs as with_lrs
from ailab.optim.schedule import WarmupAndCosineAnnealingLR as WarmupAndCosineAnnealingLR
