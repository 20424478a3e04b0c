"""FaceBoxes: a face detector for CPUs, written from its paper with the parameter names of the public weights.

Rapidly digested convolutions (stride 32 in two CReLU blocks and two pools), three inceptions, three scales of anchors.
Source: arXiv 1708.05234, sections 3.1 to 3.3 and figure 1; anchor counts 21, 1, 1 from its table 1.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import WeightsError

ANCHORS = (21, 1, 1)  # 16 at 32 px (densified 4x4), 4 at 64 px (2x2), 1 at 128 px; then 256 px; then 512 px


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class CReLU(nn.Module):
    """ReLU of x and of -x: twice the channels for one convolution (section 3.1)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(torch.cat([x, -x], 1))


class Inception(nn.Module):
    """Four branches of 32 channels with receptive fields 1, 3 (average), 3 and 5 (figure 1, lower right)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(128, 32, 1)
        self.branch1x1_2 = BasicConv2d(128, 32, 1)
        self.branch3x3_reduce = BasicConv2d(128, 24, 1)
        self.branch3x3 = BasicConv2d(24, 32, 3, padding=1)
        self.branch3x3_reduce_2 = BasicConv2d(128, 24, 1)
        self.branch3x3_2 = BasicConv2d(24, 32, 3, padding=1)
        self.branch3x3_3 = BasicConv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.branch1x1_2(F.avg_pool2d(x, 3, 1, 1))
        short = self.branch3x3(self.branch3x3_reduce(x))
        long = self.branch3x3_3(self.branch3x3_2(self.branch3x3_reduce_2(x)))
        return torch.cat([self.branch1x1(x), pooled, short, long], 1)


class FaceBoxes(nn.Module):
    """BGR minus (104, 117, 123), [N, 3, H, W] -> loc [N, A, 4], conf [N, A, 2] logits; cut it at "pool2"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = CReLU(3, 24, 7, 4, 3)
        self.pool1 = nn.MaxPool2d(3, 2, 1)
        self.conv2 = CReLU(48, 64, 5, 2, 2)
        self.pool2 = nn.MaxPool2d(3, 2, 1)
        self.inception1 = Inception()
        self.inception2 = Inception()
        self.inception3 = Inception()
        self.conv3_1 = BasicConv2d(128, 128, 1)
        self.conv3_2 = BasicConv2d(128, 256, 3, 2, 1)
        self.conv4_1 = BasicConv2d(256, 128, 1)
        self.conv4_2 = BasicConv2d(128, 256, 3, 2, 1)
        widths = (128, 256, 256)
        self.loc = nn.ModuleList(nn.Conv2d(c, 4 * a, 3, padding=1) for c, a in zip(widths, ANCHORS, strict=True))
        self.conf = nn.ModuleList(nn.Conv2d(c, 2 * a, 3, padding=1) for c, a in zip(widths, ANCHORS, strict=True))

    def forward_head(self, x: Tensor) -> Tensor:
        """Up to the second pool: [N, 3, H, W] -> [N, 128, H/32, W/32]."""
        z: Tensor = self.pool2(self.conv2(self.pool1(self.conv1(x))))
        return z

    def forward_tail(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """From the second pool on: [N, 128, h, w] -> loc, conf."""
        near = self.inception3(self.inception2(self.inception1(z)))
        middle = self.conv3_2(self.conv3_1(near))
        far = self.conv4_2(self.conv4_1(middle))
        stages = (near, middle, far)
        return _flatten(self.loc, stages, 4), _flatten(self.conf, stages, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_tail(self.forward_head(x))


def _flatten(layers: nn.ModuleList, stages: tuple[Tensor, ...], width: int) -> Tensor:
    """Per stage [N, a * width, h, w] -> all anchors [N, A, width], row by row."""
    maps = (layer(x).permute(0, 2, 3, 1).flatten(1) for layer, x in zip(layers, stages, strict=True))
    joined: Tensor = torch.cat(list(maps), 1).unflatten(1, (-1, width))
    return joined


def with_weights(state: Mapping[str, Tensor]) -> FaceBoxes:
    """FaceBoxes in eval mode with the given weights, checked key by key. Raises WeightsError."""
    model = FaceBoxes()
    want = model.state_dict()
    state = {key.removeprefix("module."): value for key, value in state.items()}
    problems = [f"{key} is missing" for key in want if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in want]
    problems += [
        f"{key} is {list(state[key].shape)}, not {list(value.shape)}"
        for key, value in want.items()
        if key in state and state[key].shape != value.shape
    ]
    problems += [
        f"{key} holds values that are not finite"
        for key in want
        if key in state and state[key].is_floating_point() and not bool(torch.isfinite(state[key]).all())
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"weights that are not FaceBoxes': {'; '.join(problems[:3])}{more}",
            wanted=f"{len(want)} tensors named conv1.conv.weight to conf.2.bias",
            do="see docs/data-and-weights.md for where FaceBoxesProd.pth is published",
        )
    model.load_state_dict(state)
    return model.eval()
