"""Several processes: who we are, how the group is made, and the collectives that the rest of ailab uses."""

from ailab.dist.group import agree as agree
from ailab.dist.group import all_gather as all_gather
from ailab.dist.group import all_reduce as all_reduce
from ailab.dist.group import barrier as barrier
from ailab.dist.group import begin_from_first as begin_from_first
from ailab.dist.group import begin_sum as begin_sum
from ailab.dist.group import begin_sum_of_bucket as begin_sum_of_bucket
from ailab.dist.group import blamed as blamed
from ailab.dist.group import current_rendezvous as current_rendezvous
from ailab.dist.group import broadcast_bytes as broadcast_bytes
from ailab.dist.group import compare as compare
from ailab.dist.group import from_first as from_first
from ailab.dist.group import launched as launched
from ailab.dist.group import meet as meet
from ailab.dist.group import peers as peers
from ailab.dist.group import pick_device as pick_device
from ailab.dist.group import rank as rank
from ailab.dist.group import start as start
from ailab.dist.group import stop as stop
from ailab.dist.group import summed as summed
from ailab.dist.group import world_size as world_size
