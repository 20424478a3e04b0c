"""`sfumato demo`: the main job on photographs that dependencies ship, told on one page that needs no network.

Clean and obfuscated detections, what leaves, what a decoder trained against it recovers, and the table of a sweep over
alpha. All noise comes from one seed, so the same versions give the same figures; what really leaves a trust zone takes
fresh noise. Every figure on the page is one of `demo.json` beside it.
"""

import json
import math
import platform
import shlex
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm.auto import tqdm

import sfumato
from sfumato.attack import decoder as attacker
from sfumato.attack.decoder import Decoder
from sfumato.core.errors import RequestError
from sfumato.core.files import write_bytes
from sfumato.core.release import Release
from sfumato.core.task import Image
from sfumato.datasets import fddb, sampler
from sfumato.datasets import images as files
from sfumato.facade import SHIPPED
from sfumato.measurement import ALPHAS, Measurement, Seeded, measure
from sfumato.tasks.detection.boxes import Detections, draw
from sfumato.trusted.protect import Protected

PAGE, REPORT, DATA = "index.html", "demo.json", "data"
DECODER = "decoder.safetensors"
IMAGES = 60  # a sweep over so many takes about a minute on two cores
FIRST_SHOWN = 0.8  # the default of `Protected`
SHOWN = 0.5  # score from which a detection is drawn
SIDE, FACE_SIDE, QUALITY = 384, 112, 80  # pixels on the page, about twice what a phone gives a picture; JPEG quality
CHANNELS, ACROSS, SEAM = 16, 4, 1  # of a release shown: 16 kB of its 65
ROOM, FACE_ROOM = 2.6, 1.5  # how far a crop reaches, in heights of its tallest face
CLEAN_COLOUR, OBFUSCATED_COLOUR = (80, 220, 40), (0, 150, 255)  # BGR

Window = tuple[int, int, int]  # a square of a photograph: x, y, side
Crops = tuple[Window, Window]


@dataclass(frozen=True, eq=False)
class Photograph:
    """One of those shown: its name, what it shows, BGR pixels, and its faces [n, 4] x1 y1 x2 y2."""

    name: str
    what: str
    image: Image
    faces: np.ndarray


@dataclass(frozen=True)
class Demo:
    """What was written, and the report in it."""

    page: Path
    json: Path
    report: dict[str, Any]


def decoder_of(artefacts: Path | None, protected: Protected) -> Decoder | None:
    """The decoder trained against the shipped fit, or against that in `artefacts`; None where there is none."""
    path = (SHIPPED if artefacts is None else artefacts) / DECODER
    if not path.exists():
        return None
    return attacker.load(path, protected).to(protected.obfuscator.mean.device)


def run(
    protected: Protected,
    decoder: Decoder | None,
    out: Path,
    *,
    images: int = IMAGES,
    seed: int = 0,
    alphas: Sequence[float] = ALPHAS,
    options: Sequence[str] = (),
    quiet: bool = False,
) -> Demo:
    """Compose the data, sweep alpha, look at three photographs, write `out/index.html` and `out/demo.json`.

    `options`: what the command to reproduce needs beside the rest. Raises RequestError, OutputError, DatasetError.
    """
    if seed < 0:
        raise RequestError(f"seed {seed}", wanted="0 or more", do="--seed 0")
    begun = perf_counter()
    root = sampler.compose(out / DATA / f"{images}-images-seed-{seed}", images=images, seed=seed)
    dataset = fddb.load(root)
    table = measure(protected, dataset, alphas=(None, *alphas), seeds=(seed,), quiet=quiet)
    looks = [
        _look(protected, decoder, photo, [(a, Seeded(seed, number, round(a * 10_000))) for a in alphas])
        for number, photo in enumerate(tqdm(photographs(dataset), "pictures", disable=quiet))
    ]
    figures, shown = [figures for figures, _ in looks], [shown for _, shown in looks]
    words = ["sfumato", "demo", "--out", out.name, "--images", str(images), "--seed", str(seed), *options]
    report = {
        "command": shlex.join(words),
        "data": {"name": "sampler", "images": table.images, "faces": table.faces, "seed": seed},
        "digest": protected.digest,
        "threshold": SHOWN,
        "versions": _versions(),
        "table": _table(table, figures),
        "pictures": figures,
        "measurement": _finite(table.as_dict()),
        "seconds": round(perf_counter() - begun, 1),
    }
    origins = _origins((root / sampler.NOTE).read_text(encoding="utf-8"))
    write_bytes(out / REPORT, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    page = render(report, shown, origins, weights=_weights(decoder))
    write_bytes(out / PAGE, page.encode())
    return Demo(out / PAGE, out / REPORT, report)


def render(
    report: dict[str, Any], shown: Sequence[dict[str, Any]], origins: list[list[str]], *, weights: int | None
) -> str:
    """The page: a function of the report, the pictures as data URIs, and the decoder's number of weights."""
    world = Environment(
        loader=PackageLoader("sfumato"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    alphas = [row["alpha"] for row in report["table"] if row["alpha"] is not None]
    first = min(alphas, key=lambda alpha: abs(float(alpha) - FIRST_SHOWN))
    rows = list(zip(report["pictures"], shown, strict=True))
    return world.get_template("demo.html.j2").render(
        report=report, rows=rows, alphas=alphas, first=first, origins=origins, weights=weights
    )


def photographs(dataset: fddb.Fddb) -> list[Photograph]:
    """The two portraits that the sampler cuts people from, and one scene composed of both."""
    astronaut = files.read(sampler._shipped("scikit-image", "skimage", "data/astronaut.png"))
    hopper = files.read(sampler._shipped("matplotlib", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"))
    scene = max(dataset, key=_telling)
    return [
        Photograph("Astronaut", "Eileen Collins, NASA portrait", astronaut, _boxes(sampler.ASTRONAUT_FACE)),
        Photograph("Grace Hopper", "US Navy portrait", hopper, _boxes(sampler.HOPPER_FACE)),
        Photograph("Composed scene", f"{scene.name} of the data", files.read(scene.path), scene.boxes),
    ]


def _boxes(ellipse: tuple[float, ...]) -> np.ndarray:
    return fddb.boxes(np.array([ellipse]))


def _telling(entry: fddb.Entry) -> tuple[bool, float]:
    """Several faces that one square crop holds come first; of those, the scene whose smallest face is largest."""
    spread = np.ptp(entry.boxes.reshape(-1, 2), axis=0).max()
    heights = entry.boxes[:, 3] - entry.boxes[:, 1]
    return len(entry.boxes) > 1 and bool(spread < sampler.HEIGHT), float(heights.min())


def _look(
    protected: Protected, decoder: Decoder | None, photo: Photograph, arms: Sequence[tuple[float, Seeded]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One photograph under every alpha: (figures for the report, pictures for the page)."""
    size = photo.image.shape[:2]
    z = protected.cut([photo.image])
    clean = _found(protected, None, z, size)
    flat = None if decoder is None else attacker.psnr(*_flat(photo.image, (z.shape[2], z.shape[3])))
    crops = _crops(photo)
    figures: dict[str, Any] = {"name": photo.name, "what": photo.what, "clean": clean.as_rows(), "flat_psnr": flat}
    shown: dict[str, Any] = {"clean": _marked(photo.image, crops[0], clean, CLEAN_COLOUR)}
    shown["face"] = _jpeg(_crop(photo.image, crops[1], FACE_SIDE))
    figures["at"], shown["at"] = [], []
    for alpha, noise in arms:
        release = protected.with_noise(noise).obfuscate(z, alpha)
        found = _found(protected, release, z, size)
        views = {"obfuscated": _marked(photo.image, crops[0], found, OBFUSCATED_COLOUR)}
        views["codes"] = _codes(protected, release)
        psnr = None if decoder is None else _recover(decoder, release, photo.image, crops, views)
        figures["at"].append({"alpha": alpha, "detections": found.as_rows(), "psnr": psnr})
        shown["at"].append(views)
    return figures, shown


@torch.inference_mode()
def _found(protected: Protected, release: Release | None, z: torch.Tensor, size: tuple[int, int]) -> Detections:
    """Detections at the one threshold: of the release, or of the clean head output where there is none."""
    if protected.reference is None or protected.outside is None:
        raise RequestError("only the trusted side is here", wanted="client and server artefacts, to show both sides")
    raw = protected.reference(z) if release is None else protected.outside(release)
    found: Detections = protected.postprocess(raw, size)
    return found.above(SHOWN)


def _recover(decoder: Decoder, release: Release, image: Image, crops: Crops, views: dict[str, str]) -> float:
    """PSNR of what the decoder recovers, at its own size; adds its picture and its face to the views."""
    truth = _target(image, release.sites)
    picture = decoder.reconstruct(release, truth.shape[:2])
    whole = cv2.resize(picture, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    views["recovered"] = _jpeg(_crop(whole, crops[0], SIDE))
    views["face"] = _jpeg(_crop(whole, crops[1], FACE_SIDE))
    return attacker.psnr(picture, truth)


def _flat(image: Image, sites: tuple[int, int]) -> tuple[Image, Image]:
    """(one colour, the photograph's mean; the photograph), both of the decoder's size."""
    truth = _target(image, sites)
    return np.broadcast_to(truth.mean((0, 1)).round(), truth.shape), truth


def _target(image: Image, sites: tuple[int, int]) -> Image:
    """What a decoder of (height, width) sites should give."""
    picture: Image = (attacker.target(image, sites).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return picture


def _codes(protected: Protected, release: Release) -> str:
    """The channels that carry most bits at this alpha, byte for byte: code -127 is black, 127 white. Data URI, PNG."""
    shape = protected.obfuscator.shape
    bits = protected.obfuscator.allocation(release.alpha)[0].view(shape.k, -1).sum(1)
    order = bits.argsort(descending=True)[:CHANNELS]
    placed = torch.nn.functional.pixel_shuffle(release.tensor[:1].to(torch.int16), shape.block)[0]
    grey = (placed[order] + 128).to(torch.uint8).cpu().numpy()
    grey = np.pad(grey, ((0, -len(grey) % ACROSS), (0, SEAM), (0, SEAM)), constant_values=255)
    tiles = [np.hstack(list(grey[i : i + ACROSS])) for i in range(0, len(grey), ACROSS)]
    return _uri("png", np.vstack(tiles)[:-SEAM, :-SEAM])


def _window(size: tuple[int, int], faces: np.ndarray, room: float) -> Window:
    """A square (x, y, side) inside the photograph, round the middle of the faces."""
    low, high = faces[:, :2].min(0), faces[:, 2:].max(0)
    reach = max(room * float((faces[:, 3] - faces[:, 1]).max()), 1.2 * float((high - low).max()))
    side = int(min(*size, reach))
    x, y = ((low + high - side) / 2).clip(0, (size[1] - side, size[0] - side)).astype(int)
    return int(x), int(y), side


def _crops(photo: Photograph) -> Crops:
    """(round all faces, round the tallest)."""
    heights = photo.faces[:, 3] - photo.faces[:, 1]
    size = photo.image.shape[:2]
    return _window(size, photo.faces, ROOM), _window(size, photo.faces[[heights.argmax()]], FACE_ROOM)


def _crop(image: Image, window: Window, side: int) -> Image:
    x, y, wide = window
    how = cv2.INTER_AREA if wide > side else cv2.INTER_CUBIC
    return cv2.resize(image[y : y + wide, x : x + wide], (side, side), interpolation=how)


def _marked(image: Image, window: Window, found: Detections, colour: tuple[int, int, int]) -> str:
    """The crop with its boxes drawn at the page's resolution. Data URI."""
    x, y, wide = window
    boxes = (found.boxes - np.array([x, y, x, y])) * (SIDE / wide)
    return _jpeg(draw(_crop(image, window, SIDE), Detections(boxes, found.scores), colour))


def _jpeg(image: Image) -> str:
    return _uri("jpeg", image, cv2.IMWRITE_JPEG_QUALITY, QUALITY)


def _uri(kind: str, image: np.ndarray, *options: int) -> str:
    _, data = cv2.imencode(f".{kind}", image, options)
    return f"data:image/{kind};base64,{b64encode(data.tobytes()).decode()}"


def _table(table: Measurement, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an alpha, clean first: AP, drop and bits from the sweep, PSNR as the mean over the photographs shown."""
    rows = []
    for arm in table.arms:
        recovered = [at["psnr"] for one in figures for at in one["at"] if at["alpha"] == arm.alpha]
        row = {name: value for name, value in arm.as_dict().items() if name in _COLUMNS}
        row |= {
            "drop": table.drop(arm),
            "psnr": _mean(recovered),
            "flat_psnr": _mean([f["flat_psnr"] for f in figures]),
        }
        rows.append(_finite(row))
    return rows


_COLUMNS = ("alpha", "ap", "ap_low", "ap_high", "bits_per_site", "release_bytes")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for: the clean arm's capacity has no bound."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _weights(decoder: Decoder | None) -> int | None:
    return None if decoder is None else sum(p.numel() for p in decoder.parameters())


def _versions() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "sfumato": sfumato.__version__,
        "Python": platform.python_version(),
        "PyTorch": str(torch.__version__),
        "NumPy": np.__version__,
        "OpenCV": cv2.__version__,
    }


def _origins(note: str) -> list[list[str]]:
    """The rows of the note's table: photographs, who ships them, origin and terms."""
    rows = [line.strip("| ").split(" | ") for line in note.splitlines() if line.startswith("| ")]
    return rows[1:]
