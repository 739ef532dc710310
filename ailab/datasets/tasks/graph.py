"""Graphs: features of nodes, and the edges between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ailab.datasets.tasks.task import Task, tensor_of
from ailab.datasets.transforms.pipeline import Sample


class GraphTask(Task):
    """Samples `{"nodes": (N, F) float32, "edges": (E, 2) int64 from and to, ..., "target"}`; further fields of the graph stay.

    Nodes and edges differ in number: pad them with `PadCollate(max_size=dict(nodes=..., edges=...))`, whose masks say which count.
    """

    def load_graph(self, raw: Any) -> Mapping[str, Any]:
        """{"nodes": (N, F), "edges": (E, 2) indices of nodes, and more, such as "edge_features": (E, D)}."""
        raise NotImplementedError(f"{type(self).__name__}: define load_graph.")

    def load_label(self, raw: Any) -> Any:
        """A class, or numbers, of the graph or of each node."""
        raise NotImplementedError(f"{type(self).__name__}: define load_label.")

    def load(self, raw: Any) -> Sample:
        """The graph's fields and the target."""
        graph: Any = self.load_graph(raw)
        if not isinstance(graph, Mapping) or "nodes" not in graph or "edges" not in graph:
            raise ValueError("load_graph: expected a dict with 'nodes' (N, F) and 'edges' (E, 2)")
        fields = {str(n): tensor_of(v, f"load_graph: {n}") for n, v in cast("Mapping[Any, Any]", graph).items()}
        nodes, edges = fields["nodes"].float(), fields["edges"].long().view(-1, 2)
        if nodes.dim() != 2:
            raise ValueError(f"load_graph: expected nodes (N, F), got {tuple(nodes.shape)}")
        if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= len(nodes)):
            raise ValueError(f"load_graph: an edge goes to node {int(edges.max())} or {int(edges.min())} of {len(nodes)}")
        label = self.load_label(raw)
        return {**fields, "nodes": nodes, "edges": edges, "target": tensor_of(label, "load_label")}
