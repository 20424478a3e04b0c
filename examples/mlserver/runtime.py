"""The outside of a fit as a model of MLServer: the tensors of a release -> restorer -> tail.

`model-settings.json` names a version that `sfumato export triton` wrote with its python backend.
"""

from pathlib import Path

import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse
from torch import nn

from sfumato.core import artefact, wire
from sfumato.core.errors import SfumatoError
from sfumato.core.restorer import Restorer
from sfumato.outside.backend import PROGRAM, SERVER
from sfumato.outside.model import Outside


class Released(MLModel):
    """Answers releases of one obfuscator; refuses any other."""

    async def load(self) -> bool:
        folder = Path(self.settings.parameters.uri)
        self.header, state = artefact.read(folder / SERVER, side="server")
        restorer = Restorer(self.header.shape)
        restorer.load_state_dict(
            {name.removeprefix("restorer."): t for name, t in state.items() if name.startswith("restorer.")}
        )
        self.outside = Outside(restorer, nn.Identity(), self.header.digest)
        self.tail = torch.export.load(folder / PROGRAM).module()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        shape = self.header.shape
        try:
            release = wire.from_tensors(rows, shape.sent, shape.block, self.header.ndim)
            with torch.inference_mode():
                outputs = self.tail(self.outside(release))
        except SfumatoError as error:
            raise InferenceError(str(error)) from error
        told = [NumpyCodec.encode_output(f"OUTPUT__{i}", output.numpy()) for i, output in enumerate(outputs)]
        return InferenceResponse(model_name=self.name, model_version="1", outputs=told)
