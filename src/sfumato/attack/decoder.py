"""The learned decoder: an attacker who trains a network from releases back to pictures (arXiv 1506.02753 section 3).

Needs: the artefacts (white box), photographs of the same kind, and as many releases of them as it likes. It trains
after the obfuscator is frozen, on releases with fresh noise at every alpha, and is told alpha. Scored on photographs it
never saw, by PSNR and SSIM against the photograph, beside the zero-information anchor: the mean picture.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from tqdm.auto import tqdm

from sfumato.core.errors import ArtefactError
from sfumato.core.files import write_bytes
from sfumato.core.obfuscator import Allocation, Shape, linear_estimate
from sfumato.core.release import Release
from sfumato.core.task import Image
from sfumato.trusted.protect import Protected

UP = 8  # output pixels a site side: [3, 8 h, 8 w]
WINDOW = 16  # sites a side of a training window: a quarter of TR-4928's input, a quarter of the cost
_WIDTHS = (128, 96, 64, 32)
_EXACT = ("allocation.", "spread", "growth")  # the obfuscator's own numbers


class Decoder(nn.Module):
    """Codes int8 [N, k s^2, H, W] at alpha [N] -> BGR picture [N, 3, 8 h, 8 w] in 0..1, of whole blocks."""

    mean: Tensor
    spread: Tensor
    growth: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.allocation = Allocation(shape).requires_grad_(requires_grad=False)
        self.register_buffer("spread", torch.zeros(shape.sent))
        self.register_buffer("growth", torch.zeros(shape.sent))
        self.register_buffer("mean", torch.zeros(3))
        wide = _WIDTHS[0]
        self.enter = nn.Conv2d(shape.k, wide, 3, padding=1)
        self.trunk = nn.ModuleList(nn.Conv2d(wide, wide, 3, padding=1) for _ in range(4))
        self.up = nn.ModuleList(nn.Conv2d(a, 4 * b, 3, padding=1) for a, b in pairwise(_WIDTHS))
        self.leave = nn.Conv2d(_WIDTHS[-1], 3, 3, padding=1)

    def forward(self, codes: Tensor, alpha: Tensor) -> Tensor:
        """The attacker knows gain and noise level: it reads the linear estimate of what every site sent."""
        y, logs = codes.float() * self.allocation.steps(alpha), self.spread + alpha[:, None] * self.growth
        x = F.relu(self.enter(linear_estimate(y, self.allocation(alpha), logs, self.shape, None)))
        for layer in self.trunk:
            x = x + F.relu(layer(x))
        for layer in self.up:
            x = F.relu(F.pixel_shuffle(layer(x), 2))
        picture: Tensor = self.leave(x) + self.mean[:, None, None]
        return picture

    @torch.inference_mode()
    def reconstruct(self, release: Release, size: tuple[int, int]) -> Image:
        """What this attacker sees in the first record of a release, as BGR uint8 of (height, width)."""
        high, wide = (UP * side for side in release.sites)
        picture = self(release.tensor[:1], release.alpha[:1])[0, :, :high, :wide].clamp(0, 1).permute(1, 2, 0)
        shown = cv2.resize((picture.cpu().numpy() * 255).astype(np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
        return np.asarray(shown)


def target(photo: Image, sites: tuple[int, int]) -> Tensor:
    """The photograph as the decoder should give it: [3, 8 h, 8 w] in 0..1."""
    small = cv2.resize(photo, (UP * sites[1], UP * sites[0]), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(small.astype(np.float32) / 255).permute(2, 0, 1)


def train(
    protected: Protected,
    photos: Sequence[Image],
    *,
    steps: int = 1500,
    batch: int = 4,
    lr: float = 2e-3,
    highest: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> Decoder:
    """A decoder trained from random weights against the frozen obfuscator; alpha uniform in the log of the bits."""
    torch.manual_seed(seed)
    device = protected.obfuscator.mean.device
    decoder = Decoder(protected.obfuscator.shape)
    decoder.allocation.load_state_dict(protected.obfuscator.allocation.state_dict())
    decoder.spread.copy_(protected.obfuscator.spread)
    decoder.growth.copy_(protected.obfuscator.growth)
    decoder = decoder.to(device)
    weights = [p for p in decoder.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=lr)
    warm = max(0.1, 2 / (steps + 1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps + 1, pct_start=warm)
    bar = tqdm(_draws(photos, steps, batch, seed), "decoder", total=steps, disable=quiet)
    for step, chosen in enumerate(bar):
        alpha = 1 - (1 - highest) ** torch.rand(batch)
        z, goal = _window(protected, chosen)
        release = protected.obfuscate(z, alpha)
        if step == 0:
            decoder.mean.copy_(goal.mean((0, 2, 3)))
        picture = decoder(release.tensor.clone(), release.alpha.clone())[:, :, : goal.shape[2], : goal.shape[3]]
        loss = F.l1_loss(picture, goal) + F.mse_loss(picture, goal)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    decoder.eval().requires_grad_(requires_grad=False)
    return decoder


def _window(protected: Protected, photos: list[Image]) -> tuple[Tensor, Tensor]:
    """The head's output and the pictures to recover, in one random window of at most WINDOW x WINDOW sites."""
    z = protected.cut(photos)
    rows, cols = z.shape[2], z.shape[3]
    high, wide = min(rows, WINDOW), min(cols, WINDOW)
    top, left = int(torch.randint(rows - high + 1, ())), int(torch.randint(cols - wide + 1, ()))
    goal = torch.stack([target(photo, (rows, cols)) for photo in photos]).to(z.device)
    part = goal[:, :, UP * top : UP * (top + high), UP * left : UP * (left + wide)]
    return z[:, :, top : top + high, left : left + wide], part


def _draws(photos: Sequence[Image], steps: int, batch: int, seed: int) -> Iterator[list[Image]]:
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = [photos[int(draw.integers(len(photos)))] for _ in range(batch)]
        yield [np.ascontiguousarray(p[:, ::-1]) if draw.random() < 0.5 else p for p in chosen]


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """10 log10(255^2 / MSE), over uint8 pictures."""
    error = float(np.mean((picture.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def score(protected: Protected, decoder: Decoder, photos: Sequence[Image], alpha: float) -> dict[str, float]:
    """Mean PSNR and SSIM of reconstructions at alpha, and of the zero-information anchor: the mean picture."""
    truths, pictures = [], []
    for photo in photos:
        release = protected(photo, alpha=alpha)
        h, w = release.sites
        truths.append((target(photo, (h, w)).permute(1, 2, 0).numpy() * 255).astype(np.uint8))
        pictures.append(decoder.reconstruct(release, (UP * h, UP * w)))
    anchor = np.mean(truths, 0).astype(np.uint8)
    return {
        "psnr": float(np.mean([psnr(p, t) for p, t in zip(pictures, truths, strict=True)])),
        "ssim": float(np.mean([_ssim(p, t) for p, t in zip(pictures, truths, strict=True)])),
        "anchor_psnr": float(np.mean([psnr(anchor, t) for t in truths])),
        "anchor_ssim": float(np.mean([_ssim(anchor, t) for t in truths])),
        "photographs": float(len(truths)),
    }


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    return float(structural_similarity(a, b, channel_axis=2))  # type: ignore[no-untyped-call]


def save(decoder: Decoder, path: Path, digest: str) -> None:
    """Half-precision weights, bound to the obfuscator's digest."""
    state = {k: v if k.startswith(_EXACT) else v.half() for k, v in decoder.state_dict().items()}
    write_bytes(path, serialised({k: v.contiguous() for k, v in state.items()}, {"digest": digest}))


def load(path: Path, protected: Protected) -> Decoder:
    """The decoder at `path`. Raises ArtefactError where it was trained against another obfuscator."""
    do = "train one: sfumato fit ... --decoder-steps 1500"
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
        state = {k: v.float() for k, v in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: no decoder there", wanted="decoder.safetensors", do=do) from error
    if digest != protected.digest:
        raise ArtefactError(f"a decoder of obfuscator {str(digest)[:12]}", wanted=protected.digest[:12], do=do)
    decoder = Decoder(protected.obfuscator.shape)
    decoder.load_state_dict(state)
    decoder.eval().requires_grad_(requires_grad=False)
    return decoder
