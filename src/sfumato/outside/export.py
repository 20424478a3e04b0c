"""What the outside runs as programs that need neither sfumato nor the model's own code.

The tail is traced as [N, C, h, w] (or tokens, or vectors) with every size left open, but for the channels. `Answer` is
the whole of the outside: restorer, then tail, on the tensors of `core.wire`.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core.errors import RequestError
from sfumato.core.restorer import Restorer
from sfumato.core.sites import unfold

OPSET = 20


class Named(nn.Module):
    """The tail with its outputs as a flat tuple, whatever it returns them in."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return flat(self.tail(z))


def flat(outputs: Any) -> tuple[Tensor, ...]:
    """Tensors of nested tuples, lists and dicts, in order."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    inside = outputs.values() if isinstance(outputs, dict) else outputs
    return tuple(tensor for one in inside for tensor in flat(one))


class Answer(nn.Module):
    """CODES, CHANNELS, ALPHA, SITES, DIGEST of `core.wire`, in whole blocks -> outputs; nan for another obfuscator.

    A graph cannot refuse, and nan is the answer nobody takes for one.
    """

    digest: Tensor

    def __init__(self, restorer: Restorer, tail: nn.Module, digest: str, ndim: int) -> None:
        super().__init__()
        self.restorer, self.tail, self.ndim = restorer, Named(tail), ndim
        self.register_buffer("digest", torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8).int())

    def forward(
        self, codes: Tensor, channels: Tensor, alpha: Tensor, sites: Tensor, digest: Tensor
    ) -> tuple[Tensor, ...]:
        powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.int32, device=codes.device)
        sent, block = self.restorer.shape.sent, self.restorer.shape.block
        mask = (torch.div(channels.int()[:, :, None], powers, rounding_mode="floor") % 2).flatten(1)[:, :sent]
        place = (mask.cumsum(1) - 1).clamp_min(0)
        every = place[:, :, None, None].expand(-1, -1, codes.shape[2], codes.shape[3])
        whole = codes.float().gather(1, every) * mask[:, :, None, None]
        restored = self.restorer.restore(whole, alpha[:, 0])
        once = torch.ones_like(codes[0, 0], dtype=torch.int32)  # shapes as numbers would be fixed by a tracer
        covered = block * torch.stack([once[:, 0].sum(), once[0].sum()])
        right = (digest.int() == self.digest).all(1) & (sites == covered).all(1)
        answers = self.tail(unfold(restored, self.ndim))
        return tuple(torch.where(right.view(-1, *[1] * (answer.ndim - 1)), answer, torch.nan) for answer in answers)


def program(tail: nn.Module, example: Tensor, place: Path) -> None:
    """The tail as a torch.export program at `place`. Raises RequestError where it cannot be traced."""
    with _traced("python"):
        exported = torch.export.export(Named(tail).eval(), (example,), dynamic_shapes=(_open("", example),))
        torch.export.save(exported, place)


def onnx(module: nn.Module, inputs: Mapping[str, Tensor], outputs: int, place: Path) -> None:
    """ONNX at `place`, weights inside. Raises RequestError where it cannot be traced, or onnxscript is absent."""
    with _traced("onnxruntime"):
        made = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, opset_version=OPSET, verbose=False,
            dynamic_shapes=tuple(_open(name, example) for name, example in inputs.items()),
            input_names=list(inputs),
            output_names=[f"OUTPUT__{i}" for i in range(outputs)],
        )  # fmt: skip
        assert made is not None
        made.save(str(place))


def script(module: nn.Module, examples: Sequence[Tensor], place: Path) -> None:
    """TorchScript at `place`. Raises RequestError where it cannot be traced."""
    with _traced("pytorch"):
        torch.jit.save(torch.jit.trace(module.eval(), tuple(examples), check_trace=False), place)


def _open(name: str, example: Tensor) -> dict[int, Any]:
    """Rows and places are open, what a layer has weights for is not; of CODES everything is."""
    channels = None if name == "CODES" else {4: 1, 3: 2, 2: 1}[example.ndim]
    return {axis: torch.export.Dim.DYNAMIC for axis in range(example.ndim) if axis != channels}


@contextmanager
def _traced(backend: str) -> Iterator[None]:
    """Tracers talk much and raise what they like."""
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
        raise RequestError(
            f"the model cannot be traced ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
            wanted="a tail without branches on values", do="--backend python, or cut elsewhere",
        ) from error  # fmt: skip
