"""Modules as programs that need neither sfumato nor the model's own code: torch.export, ONNX and TorchScript.

Every size is left open but for those that a layer has weights for.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core.errors import RequestError

OPSET = 20


def flat(outputs: Any) -> tuple[Tensor, ...]:
    """Tensors of nested tuples, lists and dicts, in order."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    inside = outputs.values() if isinstance(outputs, dict) else outputs
    return tuple(tensor for one in inside for tensor in flat(one))


def channel_axis(cut: Tensor) -> int:
    """Of a cut tensor, [N, C, h, w], [N, tokens, C] or [N, C]: the axis whose size a tail is made for."""
    return {4: 1, 3: 2, 2: 1}[cut.ndim]


def program(module: nn.Module, example: Tensor, fixed: Sequence[int], place: Path) -> None:
    """A torch.export program of one input, of which the axes `fixed` keep their size. Raises RequestError."""
    with _traced("python"):
        module(example)
        exported = torch.export.export(module.eval(), (example,), dynamic_shapes=(_open(example, fixed),))
        torch.export.save(exported, place)


def onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    fixed: Mapping[str, Sequence[int]],
    place: Path,
    facts: Mapping[str, str] | None = None,
) -> None:
    """ONNX with weights inside; `facts` become its metadata. Raises RequestError, also where onnxscript is absent."""
    with _traced("onnxruntime"):
        module(*inputs.values())  # what a module computes once and keeps must not be a tracer's stand-in
        shapes = tuple(_open(example, fixed.get(name, ())) for name, example in inputs.items())
        made = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, opset_version=OPSET, verbose=False,
            dynamic_shapes=shapes, input_names=list(inputs), output_names=list(outputs),
        )  # fmt: skip
        assert made is not None
        made.model.metadata_props.update(facts or {})
        made.save(str(place))


def script(module: nn.Module, examples: Sequence[Tensor], place: Path) -> None:
    """TorchScript by tracing. Raises RequestError."""
    with _traced("pytorch"):
        module(*examples)
        torch.jit.save(torch.jit.trace(module.eval(), tuple(examples), check_trace=False), place)


def _open(example: Tensor, fixed: Sequence[int]) -> dict[int, Any]:
    return {axis: torch.export.Dim.DYNAMIC for axis in range(example.ndim) if axis not in fixed}


@contextmanager
def _traced(backend: str) -> Iterator[None]:
    """Tracers talk much and raise what they like."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            with torch.no_grad():
                yield
    except ImportError as error:
        raise RequestError(
            f"{error.name} is not installed", wanted=f"it, for --backend {backend}", do="pip install 'sfumato[onnx]'"
        ) from error
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        said = (str(root).splitlines() or [""])[0][:200]
        raise RequestError(
            f"the model cannot be traced ({type(root).__name__}: {said})",
            wanted="a tail without branches on values", do="--backend python, or cut elsewhere",
        ) from error  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
