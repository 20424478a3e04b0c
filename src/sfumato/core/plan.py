"""What a cut costs, what one run of a model shows, and the graph of its forward; none of it changes the model.

Modes and random state are put back; no hook and no attribute stays behind. Multiply-adds are half of what PyTorch's
FlopCounterMode counts (matrix products and convolutions).
"""

import dis
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

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


# --- following a model with torch.fx -------------------------------------------------------------------------------


class UntraceableError(Exception):
    """This route cannot follow the model's forward."""


def lookalike(module: nn.Module, overrides: dict[str, Any]) -> nn.Module:
    """The same attributes under a subclass of its class, without the hooks that its user hung on it."""
    cls = type(module)
    twin: nn.Module = object.__new__(type(cls.__name__, (cls,), {"__module__": cls.__module__, **overrides}))
    hooks = {k: type(v)() for k, v in vars(module).items() if k.startswith(("_forward", "_backward")) and "_hooks" in k}
    vars(twin).update({**vars(module), **hooks})
    return twin


class _Value(fx.Proxy):
    """A traced value that knows, where the example tells, how many dimensions it has."""

    tracer: "Tracer"

    def __getattr__(self, k: str) -> Any:
        if k == "is_nested":
            return False
        if k in ("shape", "ndim", "size", "dim", "numel") and self.node.op == "get_attr":
            return getattr(self.tracer.tensors[str(self.node.target)], k)
        rank = self.tracer.rank(self.node) if k in ("ndim", "dim") else None
        if rank is None:
            return _Attribute(self, k)
        return rank if k == "ndim" else lambda: rank

    def __len__(self) -> int:
        length = self.tracer.length(self.node)
        return fx.Proxy.__len__(self) if length is None else length


class _Attribute(Attribute):
    tracer: "Tracer"
    __getattr__ = _Value.__getattr__
    __len__ = _Value.__len__


class Tracer(fx.Tracer):
    """Opens the modules that contain the cut and no other; `self.training` stays live, buffers stay buffers."""

    proxy_buffer_attributes = True

    def __init__(self, inputs: Inputs | None, seen: Walk | None, method: str = "forward") -> None:
        super().__init__(autowrap_modules=(math,))
        self.traced_func_name = method
        self.inputs, self.seen = inputs, seen
        self.opened: set[int] = set()
        self.live = self.ranked = False
        self.autocast = _autocast()
        self.values: dict[fx.Node, Any] = {}

    def follow(self, model: nn.Module, inside: frozenset[int]) -> tuple[fx.Graph, nn.Module]:
        """The graph of the model's forward, and a look-alike of the model that holds what the graph names."""
        if self.traced_func_name in vars(model):
            raise UntraceableError(f"{self.traced_func_name} was replaced on the instance")
        try:
            root = self.opening(model, inside | {id(model)}, {})
            self.tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
            self.live = True
            with _recording(type(module).forward for module in root.modules() if id(module) in self.opened):
                return self.trace(root), root
        except Exception as error:
            raise UntraceableError(brief(error)) from error
        finally:
            self.live = False

    def opening(self, module: nn.Module, inside: frozenset[int], done: dict[int, nn.Module]) -> nn.Module:
        """A shallow copy of the modules to open, so that tracing leaves nothing on the model."""
        if id(module) not in inside or id(module) in done:
            return done.get(id(module), module)
        mode = property(self.training_of, lambda m, value: vars(m).update(training=value))
        twin = done[id(module)] = lookalike(module, {"training": mode})
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {k: m and self.opening(m, inside, done) for k, m in module._modules.items()}
        self.opened.add(id(twin))
        return twin

    def training_of(self, module: nn.Module) -> Any:
        if not self.live or module not in (self.submodule_paths or {}):
            return vars(module)["training"]
        path = self.path_of_module(module)
        return self.create_proxy("get_attr", f"{path}.training" if path else "training", (), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self.opened

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if m not in (self.submodule_paths or {}):  # made on the fly, such as a slice of a Sequential
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """As many inputs as the example has, else as many as are required; the others keep their defaults."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        count = len(self.inputs) if self.inputs else max(sum(p.default is p.empty for p in named), 1)
        names = ([p.name for p in named] + [f"input_{i}" for i in range(len(named), count)])[:count]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast() != self.autocast:
            raise UntraceableError("its forward switches autocast on or off")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: Any) -> bool:
        if obj.node.op == "get_attr" and str(obj.node.target).rpartition(".")[2] == "training":
            check(self.graph, evaluating, obj.node)
            return False
        if _asserted(sys._getframe(2)):
            self.create_node("call_function", torch._assert, (obj.node, "an assertion of the model's forward"), {})
            return True
        return super().to_bool(obj)

    def iter(self, obj: Any) -> Iterator[Any]:
        length = self.length(obj.node)
        return super().iter(obj) if length is None else iter([obj[i] for i in range(length)])

    def rank(self, node: fx.Node) -> int | None:
        value = self.value(node)
        self.ranked |= isinstance(value, Tensor)
        return value.ndim if isinstance(value, Tensor) else None

    def length(self, node: fx.Node) -> int | None:
        """Length of a shape, or of what a module returns; that of a tensor may differ from record to record."""
        value = self.value(node)
        fixed = isinstance(value, torch.Size) or (isinstance(value, tuple | list) and node.op == "call_module")
        self.ranked |= fixed
        return len(value) if fixed else None

    def value(self, wanted: fx.Node) -> Any:
        """What the example gives here, on the meta device; None where there is no example or no way to tell."""
        for node in self.graph.nodes if self.seen else ():
            if node not in self.values:
                try:
                    self.values[node] = self.evaluate(node)
                except Exception:
                    self.values[node] = None
        return self.values.get(wanted)

    def evaluate(self, node: fx.Node) -> Any:
        earlier = [n for n in self.values if n.op == node.op]
        if node.op == "placeholder" and self.inputs:
            return self.inputs[len(earlier)].to("meta")
        if node.op == "get_attr":
            return self.tensors[str(node.target)].detach().to("meta")
        if node.op == "call_module" and self.seen:
            return self.seen.visits[str(node.target)][sum(n.target == node.target for n in earlier)].output
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.get)
        if callable(node.target):
            return node.target(*args, **kwargs)
        return getattr(args[0], node.target)(*args[1:], **kwargs)


# These take sizes, not tensors, so torch.fx records them only if told to.
_MAKERS = (
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "eye",
    "linspace",
    "tensor",
    "rand",
    "randn",
    "randint",
    "randperm",
)


class _Torch:
    """The torch module as the opened forwards see it: its constructors record themselves where sizes are traced."""

    def __getattr__(self, name: str) -> Any:
        return _recorded(getattr(torch, name)) if name in _MAKERS else getattr(torch, name)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        proxies = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
        return (
            proxies[0].tracer.create_proxy("call_function", function, args, kwargs)
            if proxies
            else function(*args, **kwargs)
        )

    return called


@contextmanager
def _recording(forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Swap torch and its constructors in the globals of these functions alone; torch itself stays as it is."""
    makers = {id(getattr(torch, name)): getattr(torch, name) for name in _MAKERS}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for names in {id(f.__globals__): f.__globals__ for f in map(inspect.unwrap, forwards)}.values():
            for name, value in list(names.items()):
                if value is torch or id(value) in makers:
                    swapped.append((names, name, value))
                    names[name] = _Torch() if value is torch else _recorded(value)
        yield
    finally:
        for names, name, value in swapped:
            names[name] = value


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _asserted(frame: FrameType) -> bool:
    """Whether a frame is about to decide an assert statement: jump if true, else load AssertionError."""
    ahead = [i for i in dis.get_instructions(frame.f_code) if i.offset >= frame.f_lasti and i.opname != "CACHE"]
    jump = next((i for i, step in enumerate(ahead[:3]) if "JUMP" in step.opname), None)
    if jump is None or "IF_TRUE" not in ahead[jump].opname:
        return False
    return "ASSERTION_ERROR" in ahead[jump + 1].opname or ahead[jump + 1].argval is AssertionError
