"""The scaling model of benchmarks/README.md: the estimated efficiency of data parallelism on 1 to 1,024 GPUs.

    python benchmarks/scaling.py [--resnet-ms 64] [--gpt-ms 142] [--jitter 0.01]

The time of a step on one GPU is an input. The defaults are published figures, not measurements of ailab.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

PER_NODE = 8
SUSTAINED = 0.8  # share of a link's peak that a large all-reduce reaches
NVLINK = 450e9 * SUSTAINED  # bytes/s a GPU sends; NVLink 4: 900 GB/s both ways
HOP_NVLINK, HOP_NETWORK = 1e-6, 5e-6  # s, latency of one message
BUCKET = 25 * 2**20  # bytes; DDPHook(bucket_cap_mb=25)
BACKWARD = 2 / 3  # share of the time of a step


@dataclass(frozen=True)
class Network:
    name: str
    per_node: float  # bytes/s that a node sends


NETWORKS = (Network("400 Gb/s per GPU", PER_NODE * 50e9 * SUSTAINED), Network("400 Gb/s per node", 50e9 * SUSTAINED))
WORLDS = (1, 2, 8, 16, 64, 256, 1024)


def all_reduce_seconds(gpus: int, nbytes: float, network: Network) -> float:
    """Seconds of a ring all-reduce: 2 (n - 1) / n of the bytes over the slowest link, and the latency of the hops."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / PER_NODE)
    band = NVLINK if nodes == 1 else min(NVLINK, network.per_node)
    hops = 2 * (min(gpus, PER_NODE) - 1) * HOP_NVLINK + 2 * math.ceil(math.log2(nodes)) * HOP_NETWORK
    return 2 * (gpus - 1) / gpus * nbytes / band + hops


def efficiency(step: float, params: float, width: int, gpus: int, network: Network, jitter: float, overlap: bool) -> float:
    """The time of a step on one GPU divided by its time on many GPUs, with the same number of samples per GPU."""
    buckets = max(1, round(4 * params / BUCKET))  # the size limit is for float32 gradients, whatever dtype is sent
    each = all_reduce_seconds(gpus, width * params / buckets, network)
    exposed = buckets * each
    if overlap:  # the first bucket is sent after its share of the backward; after the last one no backward is left
        exposed = each + max(0.0, (buckets - 1) * (each - BACKWARD * step / buckets))
    waiting = jitter * step * math.sqrt(2 * math.log(gpus))  # for the slowest rank; the times are normally distributed
    return step / (step + exposed + waiting)


def table(name: str, step: float, params: float, jitter: float) -> str:
    rows = [f"| {name}, {1e3 * step:.0f} ms | " + " | ".join(f"{n:,}" for n in WORLDS) + " |", "|---" * (len(WORLDS) + 1) + "|"]
    for network in NETWORKS:
        for what, width in (("float32", 4), ("bf16", 2)):
            for overlap in (True, False):
                cells = [f"{100 * efficiency(step, params, width, n, network, jitter, overlap):.1f}" for n in WORLDS]
                when = "during the backward" if overlap else "after the backward"
                rows.append(f"| {network.name}, {what}, {when} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resnet-ms", type=float, default=64.0)
    parser.add_argument("--gpt-ms", type=float, default=142.0)
    parser.add_argument("--jitter", type=float, default=0.01)
    args = parser.parse_args()
    print(table("ResNet-50", args.resnet_ms / 1e3, 25.56e6, args.jitter))
    print()
    print(table("Transformer, 124M", args.gpt_ms / 1e3, 124.4e6, args.jitter))


if __name__ == "__main__":
    main()
