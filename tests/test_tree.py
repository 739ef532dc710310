"""Pure maths on nested tensors."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ailab import tree
from ailab.types import TrainState


@dataclass(frozen=True)
class Node:
    a: Any
    b: Any


class Pair(NamedTuple):
    x: Any
    y: Any


TENSORS = st.integers(0, 9).map(lambda n: torch.full((n % 3, 2), float(n)))
PLAIN = st.sampled_from([None, True, 3, 2.5, "text"])
TREES = st.recursive(
    TENSORS | PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["p", "q", 7]), inner, max_size=3)
        | st.builds(Node, inner, inner)
        | st.builds(Pair, inner, inner)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types and every bit of every tensor."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (Node, TrainState)):
        return same(vars(a), vars(b))
    return a == b


@given(TREES)
def test_unflatten_undoes_leaves(value: Any) -> None:
    """A tree rebuilt from its own leaves is the same tree: types, keys, order and values."""
    assert same(tree.unflatten(value, tree.leaves(value)), value)


@given(TREES)
def test_items_are_the_leaves_with_their_paths(value: Any) -> None:
    """`items` gives the leaves of `leaves`, in the same order."""
    pairs = list(tree.items(value))
    assert all(a is b for a, b in zip((leaf for _, leaf in pairs), tree.leaves(value), strict=True))


def test_paths_are_dotted() -> None:
    """A path names keys, positions and fields from the root."""
    value = {"a": [1, Node(2, {"c": 3})], "d": Pair(4, 5)}
    assert dict(tree.items(value)) == {"a.0": 1, "a.1.a": 2, "a.1.b.c": 3, "d.0": 4, "d.1": 5}


@given(TREES)
def test_map_with_the_identity_changes_nothing(value: Any) -> None:
    """Mapping the identity gives the tree, plain leaves included; the tensors are the very same objects."""
    mapped = tree.map(lambda t: t, value)
    assert same(mapped, value)
    assert all(a is b for a, b in zip(tree.leaves(mapped), tree.leaves(value), strict=True))


def test_map_refuses_trees_of_other_sizes() -> None:
    """Trees that do not zip raise instead of being cut to the shorter one."""
    with pytest.raises(ValueError, match="zip"):
        tree.map(torch.add, [torch.ones(1)], [torch.ones(1), torch.ones(1)])


@given(TREES)
def test_clone_shares_no_memory(value: Any) -> None:
    """A clone is equal, requires no grad, and writing to it leaves the original as it was."""
    before = [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in tree.leaves(value)]
    copy = tree.clone(value)
    assert same(copy, value)
    for leaf in tree.leaves(copy):
        if isinstance(leaf, Tensor):
            leaf.add_(1)
    assert [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in tree.leaves(value)] == before


def test_clone_detaches() -> None:
    """A clone of a parameter is a plain tensor outside of every graph."""
    copy = tree.clone([torch.nn.Parameter(torch.ones(2))])[0]
    assert type(copy) is Tensor
    assert not copy.requires_grad


@given(st.floats(0, 1), st.integers(0, 99))
def test_lerp_is_torch_lerp(weight: float, seed: int) -> None:
    """`lerp` equals torch.lerp leaf by leaf, bitwise, for a float and for a 0-d weight; integers are taken from the end."""
    gen = torch.Generator().manual_seed(seed)
    start, end = ({"w": torch.randn(4, generator=gen), "n": torch.tensor(k)} for k in (1, 2))
    for w in (weight, torch.tensor(weight, dtype=torch.float64)):
        got = tree.lerp(start, end, w)
        expected = torch.lerp(start["w"], end["w"], w if isinstance(w, float) else w.float())
        assert torch.equal(got["w"], expected)
        assert torch.equal(got["n"], torch.tensor(2))


def test_where_picks_the_whole_tree() -> None:
    """`where` is one of its two trees, bitwise, also where the other one is NaN, has other plain values, or another structure."""
    a = {"x": torch.tensor([1.0, 2.0]), "k": "a", "n": 3, "l": [torch.ones(2)], "late": {}}
    b = {"x": torch.tensor([float("nan"), 3.0]), "k": "b", "n": 3, "l": [torch.ones(2), None], "late": {"m": torch.ones(1)}}
    for chosen, other in ((a, b), ({**b, "x": torch.zeros(2)}, a)):
        assert same(tree.where(torch.tensor(True), chosen, other), chosen)
        assert same(tree.where(torch.tensor(False), other, chosen), chosen)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 99))
def test_norm_is_that_of_one_vector(sizes: list[int], seed: int) -> None:
    """The norm of a tree is the norm of all its elements as one vector, for the orders 2 and infinity."""
    gen = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, generator=gen, dtype=torch.float64) for n in sizes]
    for order in (2.0, float("inf")):
        torch.testing.assert_close(
            tree.norm({"a": parts, "b": "text"}, order), torch.cat(parts).norm(order), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_finds_one_bad_element(bad: float) -> None:
    """One NaN or infinity anywhere makes a tree not finite; elements whose squares overflow do not."""
    good = {"a": torch.full((3,), 1e30), "b": torch.zeros(2)}
    assert bool(tree.finite(good))
    for name, index in (("a", 1), ("b", 0)):
        spoilt = tree.clone(good)
        spoilt[name][index] = bad
        assert not bool(tree.finite(spoilt))


def test_nbytes_counts_tensors_only() -> None:
    """`nbytes` is the sum of elements times their size."""
    assert tree.nbytes([torch.zeros(3), torch.zeros(2, dtype=torch.int64), "text", None]) == 3 * 4 + 2 * 8


def test_what_is_made_is_freed_with_its_last_reference() -> None:
    """No cycle holds the leaves: a batch that is done with must not wait for the garbage collector."""
    gc.disable()
    try:
        made = tree.map(torch.clone, {"a": torch.ones(3), "b": [torch.ones(2), 1]})
        seen = [weakref.ref(made["a"]), weakref.ref(made["b"][0])]
        del made
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()
