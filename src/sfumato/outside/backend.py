"""Runs inside Triton's python backend: `model.py` of a repository that `sfumato export triton` wrote names a class.

Tensors cross by DLPack alone: with NumPy 2 the `as_numpy` of older servers gives zeros without a word. Every instance
tries its own crossing before it says that it is ready.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import dlpack

from sfumato.core import artefact, wire
from sfumato.core.errors import SfumatoError
from sfumato.core.restorer import Restorer
from sfumato.outside.model import Outside

PROGRAM, SERVER = "tail.pt2", "server.safetensors"


class _Program(nn.Module):
    """An exported program as a module among others: it has no train mode, and asking it for eval mode is an error."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self._program = (program,)  # hidden from Module.eval

    def forward(self, *inputs: Tensor) -> Any:
        return self._program[0](*inputs)


class _Model(ABC):
    """What both kinds share: loading, batching of the requests at hand, errors that go to the one who caused them."""

    inputs: Sequence[str]

    def initialize(self, args: dict[str, str]) -> None:
        """Called once an instance. Raises RuntimeError where tensors do not survive the crossing."""
        import triton_python_backend_utils as backend  # only the server has it

        self.backend = backend
        _try_crossing(backend)
        config = json.loads(args["model_config"])
        self.outputs = [output["name"] for output in config["output"]]
        gpu = args.get("model_instance_kind") == "GPU"
        self.device = torch.device(f"cuda:{args['model_instance_device_id']}" if gpu else "cpu")
        torch.set_num_threads(int(config["parameters"].get("threads", {"string_value": "1"})["string_value"]))
        folder = Path(args["model_repository"]) / args["model_version"]
        self.tail = _Program(torch.export.load(folder / PROGRAM).module().to(self.device))
        self.load(folder)

    @abstractmethod
    def load(self, folder: Path) -> None:
        """What else the version holds."""

    @abstractmethod
    def answer(self, tensors: dict[str, Tensor]) -> Sequence[Tensor]:
        """Outputs of a batch; raises SfumatoError for one that is refused."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in order; requests of one shape are computed as one batch."""
        given = [[self._input(request, name) for name in self.inputs] for request in requests]
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, tensors in enumerate(given):
            alike.setdefault(self.kind(tensors), []).append(i)
        responses: list[Any] = [None] * len(requests)
        for places in alike.values():
            joined = [torch.cat([given[i][j] for i in places]) for j in range(len(self.inputs))]
            try:
                with torch.inference_mode():
                    answers = self.answer(dict(zip(self.inputs, joined, strict=True)))
            except SfumatoError as error:
                if len(places) > 1:  # one of them is to blame, and the others are not
                    for i in places:
                        responses[i] = self.execute([requests[i]])[0]
                    continue
                refused = self.backend.TritonError(str(error), self.backend.TritonError.INVALID_ARG)
                responses[places[0]] = self.backend.InferenceResponse([], refused)
                continue
            sizes = [len(given[i][0]) for i in places]
            for i, parts in zip(places, zip(*(a.split(sizes) for a in answers), strict=True), strict=True):
                responses[i] = self.backend.InferenceResponse(
                    [self._output(*o) for o in zip(self.outputs, parts, strict=True)]
                )
        return responses

    def kind(self, tensors: Sequence[Tensor]) -> tuple[object, ...]:
        """Requests of one kind are one batch."""
        return tuple(tuple(tensor.shape[1:]) for tensor in tensors)

    def _input(self, request: Any, name: str) -> Tensor:
        return dlpack.from_dlpack(self.backend.get_input_tensor_by_name(request, name).to_dlpack())

    def _output(self, name: str, tensor: Tensor) -> Any:
        return self.backend.Tensor.from_dlpack(name, tensor.contiguous())


class Tail(_Model):
    """INPUT__0, the cut tensor in FP32 -> what the tail answers."""

    inputs = ("INPUT__0",)

    def load(self, folder: Path) -> None:
        """Nothing else."""

    def answer(self, tensors: dict[str, Tensor]) -> Sequence[Tensor]:
        z = tensors["INPUT__0"].to(self.device)
        if z.ndim == 4:
            z = z.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        outputs: Sequence[Tensor] = self.tail(z)
        return outputs


class Released(_Model):
    """The tensors of `core.wire` -> restorer -> tail."""

    inputs = tuple(wire.TYPES)

    def load(self, folder: Path) -> None:
        header, state = artefact.read(folder / SERVER, side="server")
        restorer = Restorer(header.shape)
        restorer.load_state_dict(
            {name.removeprefix("restorer."): t for name, t in state.items() if name.startswith("restorer.")}
        )
        self.outside, self.header = Outside(restorer.to(self.device), self.tail, header.digest), header

    def answer(self, tensors: dict[str, Tensor]) -> Sequence[Tensor]:
        shape = self.header.shape
        rows = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        release = wire.from_tensors(rows, shape.sent, shape.block, self.header.ndim)
        outputs: Sequence[Tensor] = self.outside(release)
        return outputs

    def kind(self, tensors: Sequence[Tensor]) -> tuple[object, ...]:
        """Of one size of records and one obfuscator, too."""
        sites, digest = tensors[self.inputs.index("SITES")], tensors[self.inputs.index("DIGEST")]
        return (*super().kind(tensors), tuple(sites.flatten().tolist()[:2]), bytes(digest.flatten().tolist()[:32]))


def _try_crossing(backend: Any) -> None:
    for kind in (torch.int8, torch.uint8, torch.int32, torch.float32):
        sent = torch.arange(1, 25, dtype=kind).reshape(2, 3, 4)
        back = dlpack.from_dlpack(backend.Tensor.from_dlpack("x", sent).to_dlpack())
        if back.dtype != kind or not torch.equal(back, sent):
            raise RuntimeError(f"{kind} tensors do not survive the server's python backend on this machine")
