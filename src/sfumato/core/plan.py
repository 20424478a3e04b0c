"""What a cut costs, what one run of a model shows, and what a graph checks as it runs; none of it changes the model.

Modes and random state are put back; no hook and no attribute stays behind. Multiply-adds are half of what PyTorch's
FlopCounterMode counts (matrix products and convolutions).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

from sfumato.core.display import facts
from sfumato.core.errors import CutError

FP32_BYTES = 4
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """One cut: `shape` is what crosses for the example, `nbytes` one record of it in fp32.

    `route` says how the model is followed: "own" (its forward_head and forward_tail), "fx" or "export".
    """

    at: str
    route: str
    shape: tuple[int, ...]
    head_parameters: int
    tail_parameters: int
    head_macs: int
    tail_macs: int

    @property
    def nbytes(self) -> int:
        return FP32_BYTES * prod(self.shape[1:])

    def _repr_html_(self) -> str:
        total = max(self.head_macs + self.tail_macs, 1)
        head, tail = (
            f"{parameters:,} parameters, {macs:,} multiply-adds ({macs / total:.0%})"
            for parameters, macs in ((self.head_parameters, self.head_macs), (self.tail_parameters, self.tail_macs))
        )
        crosses = f"{list(self.shape)}, {self.nbytes:,} bytes a record in fp32"
        return facts(f"Cut after {self.at} ({self.route})", {"head": head, "crosses": crosses, "tail": tail})

    def __str__(self) -> str:
        total = max(self.head_macs + self.tail_macs, 1)
        head, tail = (f"{macs:>17,} multiply-adds ({macs / total:.0%})" for macs in (self.head_macs, self.tail_macs))
        return (
            f"cut after {self.at} ({self.route})\n"
            f"  crosses  {list(self.shape)}, {self.nbytes:,} bytes a record in fp32\n"
            f"  head     {self.head_parameters:>13,} parameters {head}\n"
            f"  tail     {self.tail_parameters:>13,} parameters {tail}"
        )


# --- running a model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """One call of a submodule: its output on the meta device, and the model's multiply-adds up to its return."""

    output: Any
    macs: int


@dataclass(frozen=True)
class Walk:
    """What one run of a model showed: every call of every submodule by name, and the multiply-adds of the whole."""

    visits: dict[str, list[Visit]]
    macs: int


def walk(model: nn.Module, inputs: Inputs) -> Walk:
    """Run the model once and note each submodule's calls. Raises CutError where the model refuses the inputs."""
    names = {id(module): name for name, module in model.named_modules()}
    visits: dict[str, list[Visit]] = {}

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        if id(module) in names:
            shapes = _pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), output)
            visits.setdefault(names[id(module)], []).append(Visit(shapes, _macs(meter)))

    with _metering() as meter:
        handle = register_module_forward_hook(note)
        try:
            run(model, *inputs)
        finally:
            handle.remove()
    return Walk(visits, _macs(meter))


def counted(module: nn.Module, *inputs: Tensor) -> tuple[Any, int]:
    """(what the module returns, its multiply-adds)."""
    with _metering() as meter:
        out = run(module, *inputs)
    return out, _macs(meter)


def run(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Call with the same random numbers each time, on copies of the inputs: a module may write into them."""
    torch.default_generator.manual_seed(0)
    for device in {x.device for x in inputs if x.device.type == "cuda"}:
        torch.cuda.default_generators[device.index].manual_seed(0)
    try:
        return function(*(x.clone() for x in inputs))
    except CutError:
        raise
    except Exception as error:
        given = ", ".join(f"{list(x.shape)} {x.dtype} on {x.device}" for x in inputs)
        raise CutError(f"the model does not take {given}: {brief(error)}", wanted="an example that it takes") from error


def measured(head: nn.Module, tail: nn.Module, at: str, route: str, inputs: Inputs) -> Plan:
    """The plan of two sides, from running them. Raises CutError where the head gives no tensor."""
    z, head_macs = counted(head, *inputs)
    _, tail_macs = counted(tail, one_tensor(z, at))
    return Plan(at, route, tuple(z.shape), _parameters(head), _parameters(tail), head_macs, tail_macs)


def repeats(model: nn.Module, head: nn.Module, tail: nn.Module, inputs: Inputs) -> bool:
    """Whether tail(head(x)) = model(x), bit for bit; True where the model does not repeat itself either."""
    want = run(model, *inputs)
    return _same(want, run(lambda *x: tail(head(*x)), *inputs)) or not _same(want, run(model, *inputs))


def _parameters(side: nn.Module) -> int:
    return sum(p.numel() for p in side.parameters())


def _same(a: Any, b: Any) -> bool:
    left, right = list(_leaves(a)), list(_leaves(b))
    return len(left) == len(right) and all(_same_leaf(x, y) for x, y in zip(left, right, strict=True))


def _same_leaf(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b)
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def _leaves(value: Any) -> Iterator[Any]:
    """What a model returned, without the tuples, mappings and dataclasses around it."""
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    if not isinstance(value, list | tuple):
        yield value
        return
    for part in value:
        yield from _leaves(part)


def brief(error: BaseException) -> str:
    """The kind of an error and its first line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:160]}" if first else type(error).__name__


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, a random state of its own; all put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _macs(meter: FlopCounterMode) -> int:
    return int(meter.get_total_flops()) // 2


def _onednn_rnn(x: list[int], w_in: list[int], w_hidden: list[int], *_: Any, **__: Any) -> int:
    """Two matrix products a step of a fused recurrent layer over [T, N, C], which PyTorch's counter leaves out."""
    return 2 * prod(x[:2]) * (prod(w_in) + prod(w_hidden))


def _cudnn_rnn(x: list[int], weights: list[list[int]], *_: Any, **__: Any) -> int:
    return 2 * prod(x[:2]) * sum(prod(w) for w in weights if len(w) > 1)


@contextmanager
def _metering() -> Iterator[FlopCounterMode]:
    """Count multiply-adds. Fused attention hides its products from the counter, so it is off meanwhile."""
    rnn = {torch.ops.aten.mkldnn_rnn_layer: _onednn_rnn, torch.ops.aten._cudnn_rnn: _cudnn_rnn}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=rnn) as meter:
            yield meter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


# --- what a side checks while it runs ------------------------------------------------------------------------------


def check(graph: fx.Graph, function: Callable[..., Any], *args: Any) -> fx.Node:
    """A call that later traces of the graph record and do not run."""
    node = graph.call_function(function, args)
    node.meta["is_wrapped"] = True
    return node


def one_tensor(z: Any, at: str) -> Any:
    """Raises CutError unless what is to cross is a tensor."""
    if not isinstance(z, Tensor):
        raise CutError(f"'{at}' returns a {type(z).__name__}", wanted="a submodule that returns one tensor")
    return z


def same_rank(x: Tensor, rank: int) -> None:
    """Raises CutError for an input of another number of dimensions than the forward was followed with."""
    if x.ndim != rank:
        raise CutError(f"an input of {x.ndim} dimensions", wanted=f"{rank}, as in the example the model was cut with")


def agree(source: Tensor, z: Tensor, fact: str | int | slice) -> None:
    """Raises CutError unless the crossing tensor shows a fact of a tensor of the head, which the tail reads off it."""
    ours, theirs = _fact(source, fact), _fact(z, fact)
    if ours != theirs:
        raise CutError(
            f"{f'size({fact})' if isinstance(fact, int) else fact} {ours} of a tensor inside the head, "
            f"which the tail needs, where the crossing tensor has {theirs}",
            wanted="a cut whose tail needs nothing but the crossing tensor",
        )


def _fact(x: Tensor, fact: str | int | slice) -> Any:
    if isinstance(fact, str):
        return getattr(x, fact)
    return x.shape[fact] if isinstance(fact, slice) or -x.ndim <= fact < x.ndim else "absent"


class Structure:
    """The structure of what a model returns, where torch.export has flattened it."""

    def __init__(self, spec: _pytree.TreeSpec) -> None:
        self.spec = spec

    def __deepcopy__(self, memo: dict[int, Any]) -> "Structure":
        return self


def unflattened(leaves: list[Any], structure: Structure) -> Any:
    """What a model returned, from the flat list that torch.export makes of it."""
    return _pytree.tree_unflatten(leaves, structure.spec)


def evaluating(training: bool) -> None:
    """Raises CutError in training mode, where the forward branched on the mode it was cut in."""
    if training:
        raise CutError("training mode, on which the model's forward branches", wanted="eval mode, in which it was cut")
