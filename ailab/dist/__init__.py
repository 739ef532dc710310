"""Several processes: rank and world size, the process group, and the collectives that the rest of ailab uses."""

from ailab.dist.checksum import check_same_state as check_same_state
from ailab.dist.collectives import all_gather as all_gather
from ailab.dist.collectives import all_reduce as all_reduce
from ailab.dist.collectives import all_reduce_differentiable as all_reduce_differentiable
from ailab.dist.collectives import any_rank as any_rank
from ailab.dist.collectives import as_peer_error as as_peer_error
from ailab.dist.collectives import barrier as barrier
from ailab.dist.collectives import begin_all_reduce as begin_all_reduce
from ailab.dist.collectives import begin_all_reduce_bucket as begin_all_reduce_bucket
from ailab.dist.collectives import begin_broadcast_tensors as begin_broadcast_tensors
from ailab.dist.collectives import broadcast_bytes as broadcast_bytes
from ailab.dist.collectives import broadcast_tensors as broadcast_tensors
from ailab.dist.collectives import gathers as gathers
from ailab.dist.collectives import peer_error_at as peer_error_at
from ailab.dist.collectives import rank_offset as rank_offset
from ailab.dist.group import compare as compare
from ailab.dist.group import connect as connect
from ailab.dist.group import current_rendezvous as current_rendezvous
from ailab.dist.group import device_problem as device_problem
from ailab.dist.group import launched as launched
from ailab.dist.group import pick_device as pick_device
from ailab.dist.group import rank as rank
from ailab.dist.group import start as start
from ailab.dist.group import stop as stop
from ailab.dist.group import world_size as world_size
