"""Following a model's forward with torch.fx: the graph of it, up to the modules that stay whole.

Only the modules that contain the cut are opened; what their forwards ask of sizes and modes is answered where the
example tells, and refused where it does not.
"""

import dis
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.utils import _pytree

from sfumato.core.plan import Inputs, Walk, brief, check, evaluating


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
