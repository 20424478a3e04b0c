"""tail(head(x)) = model(x) to the last bit: any nn.Module cut after one of its submodules, its weights shared.

Three routes, tried in this order: the model's own `forward_head` and `forward_tail` where no cut is named; torch.fx,
which opens only the modules that contain the cut, so what the others do inside does not matter and they stay modules in
the tail; torch.export, where those branch on shapes or write into slices. A cut is valid if one tensor crosses. Sizes,
devices and dtypes that the tail needs beside it are read off the crossing tensor, and the head checks that they agree.
"""

import difflib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sfumato.core import plan as look
from sfumato.core.digest import digest_of
from sfumato.core.display import facts
from sfumato.core.errors import CutError
from sfumato.core.knife import Followed, Knife, Side, described, drop_unused, held, settle
from sfumato.core.plan import Inputs, Plan
from sfumato.core.tracer import Tracer, UntraceableError, lookalike

OWN = "forward_head"
_SHOWN = 8
# PyTorch's containers whose forward only calls what they hold; its other layers hide fused kernels and stay whole.
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)
_TUPLES = (nn.RNNBase, nn.MultiheadAttention)
_FOLDABLE = (2, 3, 4)  # [N, C], [N, T, C], [N, C, h, w]: what core.sites can fold


@dataclass(frozen=True)
class Split:
    """A model and its two sides: `head(*inputs)` -> z, `tail(z)` -> what the model returns. All share their weights.

    Cut in evaluation mode; where the forward branches on `training`, a side put into training mode raises CutError.
    """

    model: nn.Module
    head: nn.Module
    tail: nn.Module
    at: str
    plan: Plan | None

    def digest(self) -> str:
        """sha256 of the model's names, dtypes, shapes and weights."""
        return digest_of({k: v for k, v in self.model.state_dict().items() if isinstance(v, Tensor)})

    def __str__(self) -> str:
        return str(self.plan) if self.plan else f"cut after {self.at}"

    def _repr_html_(self) -> str:
        return self.plan._repr_html_() if self.plan else facts(str(self), {"plan": "give split an example"})


def split(model: nn.Module, *, at: str | None = None, example: Tensor | Inputs | None = None) -> Split:
    """Cut after the submodule `at`; without a name by forward_head/forward_tail, else at the smallest early tensor.

    `example` (one input or a tuple, any batch size) buys the plan, the choice of a cut, and a check to the last bit.
    Raises CutError, with the cuts that would work, for a name the model lacks and where not exactly one tensor crosses.
    """
    inputs = _inputs(example)
    own = hasattr(model, OWN) and hasattr(model, "forward_tail") and at in (None, OWN)
    with look.still(model):
        found = _own(model, inputs) if own else _found(model, at, inputs)
        if inputs and not look.repeats(model, found.head, found.tail, inputs):
            raise CutError(
                f"a cut at '{found.at}' whose two sides together do not repeat the model",
                wanted="a forward whose hooks and random numbers, if any, are those of its submodules",
            )
    for side in (found.head, found.tail):
        settle(side, model)
    return found


def cuts(model: nn.Module, example: Tensor | Inputs) -> list[Plan]:
    """Every submodule after which the model can be cut, in the order in which the model names them."""
    with look.still(model):
        return _Block(model, _inputs(example)).plans()


def _inputs(example: Tensor | Inputs | None) -> Inputs | None:
    inputs = (example,) if isinstance(example, Tensor) else example
    if inputs is not None and not (isinstance(inputs, tuple) and inputs and all(isinstance(x, Tensor) for x in inputs)):
        raise CutError(f"an example of type {type(example).__name__}", wanted="a tensor, or a tuple of tensors")
    return inputs


# --- the sides -----------------------------------------------------------------------------------------------------


def _found(model: nn.Module, at: str | None, inputs: Inputs | None) -> Split:
    block = _Block(model, inputs)
    at = block.smallest() if at is None else at
    try:
        knife = block.knife(at)
        head, tail = knife.sides()
        plan = look.measured(head, tail, at, knife.route, inputs) if inputs else None
    except CutError as error:
        raise block.advice(at, error) from error
    return Split(model, head, tail, at, plan)


def _own(model: nn.Module, inputs: Inputs | None) -> Split:
    head, tail = _method(model, OWN, inputs), _method(model, "forward_tail", None)
    return Split(model, head, tail, OWN, look.measured(head, tail, OWN, "own", inputs) if inputs else None)


def _method(model: nn.Module, method: str, inputs: Inputs | None) -> nn.Module:
    """One of the model's own methods as a module: what it uses where torch.fx can tell, else the whole model."""
    try:
        graph, root = Tracer(inputs, None, method).follow(model, frozenset())
    except UntraceableError:
        whole = lookalike(model, {"forward": getattr(type(model), method)})
        vars(whole).pop("forward", None)
        return whole
    drop_unused(graph)
    return Side(root, graph, type(model).__name__)


# --- one model under the knife -------------------------------------------------------------------------------------


class _Block:
    """A model, an example and what one run of it showed; finds the knife for a cut."""

    def __init__(self, model: nn.Module, inputs: Inputs | None) -> None:
        self.model, self.inputs = model, inputs
        self.seen = look.walk(model, inputs) if inputs else None
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.first_name = {id(module): name for name, module in reversed(self.modules.items())}
        self.traces: dict[frozenset[int], Followed | UntraceableError] = {}

    def smallest(self) -> str:
        """The cut with the fewest bytes a record in the first half of the multiply-adds; the deepest of equals."""
        if not self.inputs:
            raise CutError("neither a cut nor an example", wanted="one of them", do="split(model, example=x)")
        plans = self.plans()
        early = [plan for plan in plans if plan.head_macs <= plan.tail_macs]
        if not early:
            raise CutError("a model without a valid cut in its first half", wanted=_choice([p.at for p in plans]))
        return min(reversed(early), key=lambda plan: plan.nbytes).at

    def plans(self) -> list[Plan]:
        """The valid cuts after which there is work left and whose tensor can be obfuscated."""
        return [plan for at, knife in self.valid() if (plan := self.plan(at, knife))]

    def plan(self, at: str, knife: "Knife") -> Plan | None:
        if self.seen is None or self.inputs is None or not knife.leaves_work:
            return None
        visit = self.seen.visits[at][0]
        z, records = visit.output, self.inputs[0].shape[0] if self.inputs[0].ndim else 0
        if z.ndim not in _FOLDABLE or not z.is_floating_point() or z.shape[0] != records:
            return None
        if knife.facts or knife.route == "export":
            try:
                return look.measured(*knife.sides(), at, knife.route, self.inputs)
            except CutError:
                return None
        head, tail = (held(graph, knife.root) for graph in (knife.head(), knife.tail()))
        return Plan(at, knife.route, tuple(z.shape), head, tail, visit.macs, self.seen.macs - visit.macs)

    def valid(self) -> Iterator[tuple[str, "Knife"]]:
        for name in [name for name, module in self.model.named_modules() if module is not self.model]:
            try:
                yield name, self.knife(name, thorough=False)
            except CutError:
                continue

    def advice(self, at: str, error: CutError) -> CutError:
        """The same error with the cuts that would work, the nearest as what to type."""
        order = list(self.modules)
        close = [at] if at in order else difflib.get_close_matches(at, order, 1, 0.5)
        works = [plan.at for plan in self.plans()] if self.seen else [n for n, k in self.valid() if k.leaves_work]
        works.sort(key=lambda name: abs(order.index(name) - order.index(close[0])) if close else 0)
        meant = f"; did you mean '{close[0]}'?" if close and close != [at] else ""
        do = error.do or (f"split(model, at='{works[0]}')" if works else "")
        wanted = _choice(sorted(works[:_SHOWN], key=order.index), len(works) - _SHOWN) if works or self.seen else ""
        return CutError(error.got + meant, wanted=wanted, do=do)

    def knife(self, at: str, *, thorough: bool = True) -> "Knife":
        """Raises CutError. Unless `thorough`, torch.export is tried only where torch.fx fails on the whole model."""
        self.check(at)
        inside = self.inside(at)
        try:
            followed = self.trace(inside)
            cut = self.call(followed, at)
        except UntraceableError as why:
            if not thorough and isinstance(self.traces.get(frozenset([id(self.model)])), Followed):
                raise CutError(str(why)) from why
            followed = self.exported(why)
            cut = self.exit(followed, at)
        knife = Knife(followed, cut, at)
        if knife.crossing:
            names = ", ".join(described(node) for node in knife.crossing[:3])
            raise CutError(f"'{at}' lies under a skip connection: beside its output the tail needs {names}")
        return knife

    def check(self, at: str) -> None:
        """What the names and the run alone can rule out."""
        if not at or at not in self.modules:
            raise CutError(f"{type(self.model).__name__} has no submodule '{at}'")
        if self.seen is None:
            if isinstance(self.modules[at], _TUPLES):
                raise CutError(f"'{at}' returns a tuple, and one tensor has to cross")
            return
        visits = self.seen.visits.get(self.first_name[id(self.modules[at])], [])
        if len(visits) != 1:
            raise _times(at, len(visits))
        if not isinstance(visits[0].output, Tensor):
            raise CutError(f"'{at}' returns a {type(visits[0].output).__name__}, and one tensor has to cross")

    def inside(self, at: str) -> frozenset[int]:
        """The modules that hold `at`, under any of its names: these have to be opened."""
        names = [name for name, module in self.modules.items() if module is self.modules[at]]
        above = {".".join(name.split(".")[:i]) for name in names for i in range(len(name.split(".")))}
        for name in above:
            kind = type(self.modules[name])
            if kind.__module__.startswith("torch.nn.modules.") and not issubclass(kind, _CONTAINERS):
                raise CutError(f"'{at}' is part of {kind.__name__} '{name}', which PyTorch computes in one piece")
        return frozenset(id(self.modules[name]) for name in above)

    def trace(self, inside: frozenset[int]) -> Followed:
        """torch.fx through the modules of `inside`. Raises UntraceableError."""
        if inside not in self.traces:
            tracer = Tracer(self.inputs, self.seen)
            try:
                graph, root = tracer.follow(self.model, inside)
                ranks = tuple(x.ndim for x in self.inputs or ()) if tracer.ranked else ()
                self.traces[inside] = Followed(graph, root, "fx", ranks)
            except UntraceableError as why:
                self.traces[inside] = why
        found = self.traces[inside]
        if isinstance(found, UntraceableError):
            raise found
        return found

    def call(self, followed: Followed, at: str) -> fx.Node:
        """The one call of the submodule in a graph by torch.fx."""
        paths = {name for name, module in followed.root.named_modules() if module is self.modules[at]}
        calls: list[fx.Node] = [n for n in followed.graph.nodes if n.op == "call_module" and n.target in paths]
        if len(calls) != 1:
            raise _times(at, len(calls))
        return calls[0]

    def exported(self, why: UntraceableError) -> Followed:
        """torch.export through the whole model; sizes stay free where its forward lets them. Raises CutError."""
        name = type(self.model).__name__
        if not self.inputs:
            raise CutError(f"torch.fx cannot follow {name} ({why})", do="split(model, at=..., example=x)")
        found = self.traces.get(frozenset())
        if found is None:
            found = self.traces[frozenset()] = _exported(self.model, self.inputs)
        if isinstance(found, UntraceableError):
            raise CutError(f"neither torch.fx ({why}) nor torch.export ({found}) can follow {name}")
        return found

    def exit(self, followed: Followed, at: str) -> fx.Node:
        """The last value that leaves the submodule in a graph by torch.export."""
        names = {name for name, module in self.modules.items() if module is self.modules[at]}
        nodes = [n for n in followed.graph.nodes if names & {p for p, _ in n.meta.get("nn_module_stack", {}).values()}]
        held = set(nodes)
        leaving: list[fx.Node] = [node for node in nodes if not set(node.users) <= held]
        if not leaving:
            raise _times(at, 0)
        return leaving[-1]


def _exported(model: nn.Module, inputs: Inputs) -> Followed | UntraceableError:
    """A batch of one would be taken for a constant, so it is doubled."""
    several = tuple(torch.cat([x, x]) if x.ndim and len(x) == 1 else x for x in inputs)
    free = tuple(dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for x in several)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            root: Any = torch.export.export(model, several, dynamic_shapes=free, strict=False).module()
    except Exception as error:
        return UntraceableError(look.brief(error))
    root._structure = look.Structure(root.graph._codegen.pytree_info.out_spec)
    return Followed(root.graph, root, "export", flat=True)


def _times(at: str, calls: int) -> CutError:
    if calls:
        return CutError(f"'{at}' is called {calls} times, so there is no one place after it")
    return CutError(f"'{at}' is never called: it only holds others, or the forward leaves it out")


def _choice(names: list[str], more: int = 0) -> str:
    if not names:
        return "another model: this one has no valid cut"
    return f"a cut that works: {', '.join(names)}{f' and {more} more' if more > 0 else ''}"
