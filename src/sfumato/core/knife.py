"""One graph under the knife: what the head must compute, what the tail can make for itself, and what crosses.

Both sides keep the program's order, so that writes in place stay right.
"""

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx, nn

from sfumato.core import plan as look

_IN_PLACE = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}
_IN_PLACE |= {operator.iand, operator.ior, operator.ixor, operator.setitem}
_FACTS = ("shape", "ndim", "device", "dtype")


class Side(fx.GraphModule):
    """Head or tail: a graph over the model's own submodules and tensors, under the model's own names."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Side":
        twin = cast("Side", super().__deepcopy__(memo))
        settle(twin, self)
        return twin


def settle(side: nn.Module, model: nn.Module) -> None:
    """Containers that torch.fx rebuilt get the model's mode, and save only what the model saves."""
    originals = dict(model.named_modules())
    for name, module in side.named_modules():
        twin = originals.get(name)
        if twin is not module:
            module.training = model.training if twin is None else twin.training
            saved = set() if twin is None else set(twin._buffers) - twin._non_persistent_buffers_set
            module._non_persistent_buffers_set |= set(module._buffers) - saved


def drop_unused(graph: fx.Graph) -> None:
    """Forget the weights that nothing in the graph reads."""
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


@dataclass(frozen=True)
class Followed:
    """A graph of the model's forward, the module that holds what it names, and how it was found.

    `ranks` are those of the inputs where the graph depends on them; `flat` where its output has lost its structure.
    """

    graph: fx.Graph
    root: nn.Module
    route: str
    ranks: tuple[int, ...] = ()
    flat: bool = False


def described(node: fx.Node) -> str:
    """The node in the words of an error."""
    if node.op == "placeholder":
        return f"the input '{node.target}'"
    return f"the output of '{node.target}'" if node.op == "call_module" else f"the value '{node.name}'"


def held(graph: fx.Graph, root: nn.Module) -> int:
    """Parameters of what a graph names, each counted once."""
    direct = dict(root.named_parameters(remove_duplicate=False))
    held: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            held.update({id(p): p.numel() for p in root.get_submodule(str(node.target)).parameters()})
        elif node.op == "get_attr" and node.target in direct:
            held[id(direct[node.target])] = direct[node.target].numel()
    return sum(held.values())


def _asked(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """(tensor, fact) of a node that asks a tensor for its shape, one or some of its sizes, its device or its dtype."""
    source, fact = (*node.args, None, None)[:2]
    if node.op == "call_method" and node.target in ("size", "dim"):
        fact = "ndim" if node.target == "dim" else node.kwargs.get("dim", "shape") if fact is None else fact
    elif node.target is operator.getitem and isinstance(source, fx.Node) and (whole := _asked(source)):
        source, fact = (whole[0], fact) if whole[1] == "shape" else (None, None)
    elif not (node.target is torch.ops.aten.sym_size.int or (node.target is getattr and fact in _FACTS)):
        return None
    parts = (fact.start, fact.stop, fact.step) if isinstance(fact, slice) else (fact,)
    constant = all(isinstance(part, int | str | None) for part in parts)
    return (source, fact) if isinstance(source, fx.Node) and constant and fact is not None else None


def _draws(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and any(w in str(node.target) for w in ("rand", "bernoulli"))


class Knife:
    """A graph and the node to cut after. Both sides keep the program's order, so that writes in place stay right."""

    def __init__(self, followed: Followed, cut: fx.Node, at: str) -> None:
        nodes = list(followed.graph.nodes)
        self.root, self.route, self.ranks, self.flat = followed.root, followed.route, followed.ranks, followed.flat
        self.cut, self.at = cut, at
        self.before, self.after = nodes[: nodes.index(cut)], nodes[nodes.index(cut) + 1 :]

    @property
    def leaves_work(self) -> bool:
        return any(node.op in ("call_module", "get_attr") for node in (*self.borrowed, *self.after))

    @cached_property
    def borrowable(self) -> set[fx.Node]:
        """What the tail can make for itself: weights, facts of a tensor, and what is computed from these alone."""
        free: set[fx.Node] = set()
        for node in self.before:
            changes = _draws(node) or any(self.writes(n) for n in (node, *node.users))
            known = node.op not in ("placeholder", "output") and all(n in free for n in node.all_input_nodes)
            if node.op == "get_attr" or (not changes and (known or _asked(node))):
                free.add(node)
        return free

    @cached_property
    def needed(self) -> list[fx.Node]:
        """Values of the head, beside the crossing tensor, that the tail reads."""
        after = set(self.after)
        return [node for node in self.before if after & set(node.users)]

    @property
    def crossing(self) -> list[fx.Node]:
        return [node for node in self.needed if node not in self.borrowable]

    @cached_property
    def borrowed(self) -> list[fx.Node]:
        """What the tail makes for itself, in order."""
        wanted = set(self.needed)
        for node in reversed(self.before):
            if node in wanted:
                asked = self.asked(node)
                wanted |= {n for n in node.all_input_nodes if not (asked and n is asked[0])}
        return [node for node in self.before if node in wanted]

    def asked(self, node: fx.Node) -> tuple[fx.Node, Any] | None:
        """The tensor of the head that a borrowed node asks for a fact; None where the tail has that tensor itself."""
        asked = _asked(node)
        return None if asked and asked[0] in self.borrowable else asked

    @cached_property
    def facts(self) -> list[tuple[fx.Node, Any]]:
        """(tensor, fact) for every fact of the head's tensors that the tail will read off the crossing tensor."""
        readers, facts = {*self.borrowed, *self.after}, []
        for node in self.borrowed:
            if asked := self.asked(node):
                whole = asked[1] == "shape"
                finer = [_asked(user) or asked for user in node.users if user in readers] if whole else [asked]
                facts += [fact for fact in finer if fact not in facts]
        return facts

    def writes(self, node: fx.Node) -> bool:
        """Whether a node may change what it is given."""
        if node.op == "call_module":
            held = self.root.get_submodule(str(node.target)).modules()
            return any(getattr(module, "inplace", False) is True for module in held)
        if isinstance(node.target, torch._ops.OpOverload):
            return bool(node.target._schema.is_mutable)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        trailing = node.op.startswith("call") and name.endswith("_") and not name.endswith("__")
        return trailing or node.target in _IN_PLACE or node.kwargs.get("inplace") is True

    def kept(self) -> set[fx.Node]:
        """What the head runs: all that the cut needs, and all that runs for its effect."""
        kept = {self.cut, *(source for source, _ in self.facts)}
        kept |= {n for n in self.before if n.op.startswith("call") and (not n.users or self.writes(n))}
        for node in reversed([*self.before, self.cut]):
            if node in kept:
                kept |= set(node.all_input_nodes)
        return kept

    def head(self) -> fx.Graph:
        graph, env, kept = fx.Graph(), cast(dict[fx.Node, fx.Node], {}), self.kept()
        for node in (n for n in self.before if n.op == "placeholder"):
            env[node] = graph.node_copy(node)
        for node, rank in zip(list(env.values()), self.ranks, strict=False):
            look.check(graph, look.same_rank, node, rank)
        for node in [*self.before, self.cut]:
            if node in kept and node not in env:
                env[node] = graph.node_copy(node, env.__getitem__)
        for source, fact in self.facts:
            look.check(graph, look.agree, env[source], env[self.cut], fact)
        graph.output(look.check(graph, look.one_tensor, env[self.cut], self.at))
        return graph

    def tail(self) -> fx.Graph:
        graph = fx.Graph()
        z = graph.placeholder("z")
        env = {self.cut: graph.call_method("clone", (z,)) if any(self.writes(n) for n in self.after) else z}
        for node in self.borrowed:
            asked = self.asked(node)
            env[node] = graph.node_copy(node, lambda n: env[self.cut if asked and n is asked[0] else n])  # noqa: B023
        for node in (n for n in self.after[:-1] if n.users or n.op != "get_attr"):
            env[node] = graph.node_copy(node, env.__getitem__)
        out = fx.node.map_arg(self.after[-1].args[0], env.__getitem__)
        if self.flat:
            out = look.check(graph, look.unflattened, out, graph.create_node("get_attr", "_structure"))
        graph.output(out)
        return graph

    def sides(self) -> tuple[Side, Side]:
        return Side(self.root, self.head(), "Head"), Side(self.root, self.tail(), "Tail")
