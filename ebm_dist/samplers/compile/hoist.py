"""What a graph of steps makes of weights alone, taken out of it: it is made once a round."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Graph, GraphModule, Node


def take_out(graph: GraphModule, weights: slice, targets: Collection[Any]) -> GraphModule | None:
    """Move calls of `targets` that depend on some inputs alone into a graph of their own.

    Args:
        graph: has what they return as further inputs afterwards, right behind those.
        weights: which inputs. Nothing writes to what is made of them.

    Returns:
        A function of those inputs that returns the others in order; None where there are none.
    """
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"][weights]
    if not inputs:
        return None
    apart, last = Graph(), inputs[-1]
    copies = {node: apart.placeholder(node.name) for node in inputs}
    known: dict[Any, Node] = {}
    moved: dict[Node, Node] = {}  # by what returns it apart, its input here
    for node in nodes:
        if node.op != "call_function" or any(n not in copies for n in node.all_input_nodes):
            continue
        if getattr(node.target, "_schema", None) is None or node.target._schema.is_mutable:
            continue
        # Each step of the graph makes the same of them.
        copy = apart.node_copy(node, copies.__getitem__)
        key = (node.target, copy.args, tuple(copy.kwargs.items()))
        if known.setdefault(key, copy) is not copy:
            apart.erase_node(copy)
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
    apart.output(list(moved))
    apart.eliminate_dead_code()
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return GraphModule({}, apart)
