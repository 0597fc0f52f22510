"""Hoists operations that depend only on the weights out of the compiled steps.

They then run once per round.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Graph, GraphModule, Node


def hoist(graph: GraphModule, weights: slice, targets: Collection[Any]) -> GraphModule | None:
    """Move calls of `targets` that depend on the weights alone into a graph of their own.

    Args:
        graph: gets the results of those calls as new inputs, placed right after the weights.
        weights: which inputs are the weights. The graph must not write to the results.

    Returns:
        A function of the weights that returns the new inputs in order; None if there are none.
    """
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"][weights]
    if not inputs:
        return None
    hoisted, last = Graph(), inputs[-1]
    copies = {node: hoisted.placeholder(node.name) for node in inputs}
    known: dict[Any, Node] = {}
    moved: dict[Node, Node] = {}  # result in the new graph -> input of the old one
    for node in nodes:
        if node.op != "call_function" or any(n not in copies for n in node.all_input_nodes):
            continue
        if getattr(node.target, "_schema", None) is None or node.target._schema.is_mutable:
            continue
        # Every step of the graph repeats the same call: one copy serves all.
        copy = hoisted.node_copy(node, copies.__getitem__)
        key = (node.target, copy.args, tuple(copy.kwargs.items()))
        if known.setdefault(key, copy) is not copy:
            hoisted.erase_node(copy)
        copies[node] = known[key]
        if node.target not in targets:
            continue
        if copies[node] not in moved:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"{node.name}_once")
            last.meta = dict(node.meta)
            moved[copies[node]] = last
        node.replace_all_uses_with(moved[copies[node]])
    if not moved:
        return None
    hoisted.output(list(moved))
    hoisted.eliminate_dead_code()
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return GraphModule({}, hoisted)
