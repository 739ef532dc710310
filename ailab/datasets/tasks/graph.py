"""Graphs: node features and edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ailab.datasets.tasks.task import Task, tensor_of
from ailab.datasets.transforms.pipeline import Sample


class GraphTask(Task):
    """Graph learning: `{"nodes": (N, F) float32, "edges": (E, 2) int64, ..., "target"}`. An edge is (from, to).

    Further fields of the graph are kept. Graphs differ in size, so pad them with
    `PadCollate(max_size=dict(nodes=..., edges=...))`, which adds masks. Define `load_graph` and `load_label`.
    """

    def load_graph(self, raw: Any) -> Mapping[str, Any]:
        """The graph: {"nodes": (N, F), "edges": (E, 2) node indices}, and further fields such as "edge_features" (E, D)."""
        raise NotImplementedError(f"{type(self).__name__}: define load_graph.")

    def load_label(self, raw: Any) -> Any:
        """The target: a class index or numbers, for the graph or for each node."""
        raise NotImplementedError(f"{type(self).__name__}: define load_label.")

    def load(self, raw: Any) -> Sample:
        """The fields of the graph and the field "target"."""
        graph: Any = self.load_graph(raw)
        if not isinstance(graph, Mapping) or "nodes" not in graph or "edges" not in graph:
            raise ValueError("load_graph: expected a dict with 'nodes' (N, F) and 'edges' (E, 2)")
        fields = {str(n): tensor_of(v, f"load_graph: {n}") for n, v in cast("Mapping[Any, Any]", graph).items()}
        nodes, edges = fields["nodes"].float(), fields["edges"].long().view(-1, 2)
        if nodes.dim() != 2:
            raise ValueError(f"load_graph: expected nodes (N, F), got {tuple(nodes.shape)}")
        if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= len(nodes)):
            found = f"{int(edges.min())} to {int(edges.max())}"
            raise ValueError(f"load_graph: expected node indices from 0 to {len(nodes) - 1} in the edges, got {found}")
        label = self.load_label(raw)
        return {**fields, "nodes": nodes, "edges": edges, "target": tensor_of(label, "load_label")}
