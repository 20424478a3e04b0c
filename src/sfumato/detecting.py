"""Faces in photographs and folders, clean and obfuscated: pictures to look at, and JSON and CSV to go on with.

    out/annotated/NAME.jpg      the photograph with the faces found
    out/side-by-side/NAME.jpg   clean | obfuscated | what a decoder trained against the release recovers
    out/detections.json, .csv   boxes in the photograph's pixels, scores, bits and bytes let out

The results hold what the photographs show: they belong inside the trust zone.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm.auto import tqdm

from sfumato import __version__
from sfumato.attack.decoder import Decoder
from sfumato.core import channel
from sfumato.core.errors import DatasetError, ImageError, RequestError
from sfumato.core.files import write_bytes
from sfumato.core.release import Release
from sfumato.core.task import Image
from sfumato.datasets import images
from sfumato.tasks.detection.boxes import KEEP, NMS_IOU, Detections, draw
from sfumato.trusted.protect import Protected

DECODER = "decoder.safetensors"
ANNOTATED, SIDE_BY_SIDE = "annotated", "side-by-side"
TABLE, LIST = "detections.csv", "detections.json"
PANEL = (480, 640)  # height and width a photograph is fitted into, in the side-by-side picture
CAPTION, NARROWEST = 32, 320  # pixels: room for the words above a panel
SAVE_EVERY = 100  # images; what a kill can cost
QUALITY, LONGEST_JPEG = 92, 65_500  # ITU T.81 counts a side in 16 bits


@dataclass(frozen=True)
class Source:
    """One image: its file, the name its results get, and what errors call it."""

    path: Path
    name: str
    called: str


@dataclass
class Findings:
    """What a run found: a row an image, and the errors of those that could not be read."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    kept: int = 0

    @property
    def faces(self) -> int:
        return sum(len(row["faces"]) for row in self.rows)

    @property
    def clean_faces(self) -> int:
        return sum(len(row["clean_faces"]) for row in self.rows)


def sources(inputs: Sequence[Path], out: Path) -> list[Source]:
    """Images of files and folders. Raises RequestError where results would land among them, DatasetError for none.

    What is in an output folder below an input folder is left out: it may hold the results of the run before.
    """
    place = out.resolve()
    found = []
    for given in inputs:
        if place == given.resolve() or place in given.resolve().parents:
            raise RequestError(
                f"input {given} is the output folder or in it", wanted="inputs stay as they are", do="another --out"
            )
        if not given.is_dir():
            found.append((given, given.name, str(given)))
            continue
        inside = [path for path in images.paths(given) if place not in path.resolve().parents]
        called = (f"image {n} of {len(inside)} (by name) in {given}" for n in count(1))
        found += [(path, path.relative_to(given).as_posix(), name) for path, name in zip(inside, called, strict=False)]
    if not found:
        raise DatasetError(
            f"{', '.join(map(str, inputs))}: no image", wanted="images (JPEG, PNG ...) or folders of them"
        )
    names = _unique([name for _, name, _ in found])
    return [Source(path, name, called) for (path, _, called), name in zip(found, names, strict=True)]


def _unique(names: Sequence[str]) -> list[str]:
    """Names without suffix where that leaves them apart; with it, and a number, where it does not."""
    taken: set[str] = set()
    chosen = []
    for name in names:
        tries = chain([str(Path(name).with_suffix("")), name], (f"{name}-{n}" for n in count(2)))
        chosen.append(next(one for one in tries if one.lower() not in taken))
        taken.add(chosen[-1].lower())
    return chosen


def detect(
    protected: Protected,
    inputs: Sequence[Path],
    out: Path,
    *,
    alpha: float | None = 0.8,
    score: float = 0.5,
    decoder: Decoder | None = None,
    facts: dict[str, Any] | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Findings:
    """Faces that score at least `score`; alpha None is clean. Raises RequestError, OutputError.

    An image that cannot be read is passed over and listed, unless it is the only one: then its ImageError is raised.
    A run with the same `facts` (and alpha, score, artefact) goes on after the images already in `out`.
    """
    if alpha is not None:
        channel.as_alpha(alpha, 1)
    if not 0 <= score <= 1:
        raise RequestError(f"score {score}", wanted="0 to 1", do="--score 0.5")
    todo = sources(inputs, out)
    run = _run(protected, alpha, score, decoder, facts or {})
    findings, done = Findings(), {} if force else _done(out, run)

    def look(source: Source) -> None:
        before, stamp = done.get(source.name), _stamp(source.path)
        if before is not None and before["file"] == stamp:
            findings.rows.append(before)
            findings.kept += 1
            return
        image = images.read(source.path, called=source.called)
        row = {"image": source.name, "file": stamp}
        findings.rows.append(row | _one(protected, image, source.name, out, alpha, score, decoder))

    try:
        for number, source in enumerate(tqdm(todo, "detect", disable=quiet or len(todo) == 1, unit="image"), start=1):
            try:
                look(source)
            except ImageError as error:
                if len(todo) == 1:
                    raise
                findings.failed.append({"image": source.name, "error": error.got})
            if number % SAVE_EVERY == 0:
                _save(out, run, findings)
    finally:
        if findings.rows or findings.failed:
            _save(out, run, findings)
    return findings


def _stamp(path: Path) -> list[Any]:
    """Tells a photograph from another of the same name, and from what it was before a change."""
    try:
        return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    except OSError:
        return [str(path), 0, 0]


def _run(
    protected: Protected, alpha: float | None, score: float, decoder: Decoder | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """What results depend on, beside the photographs."""
    return {
        "sfumato": __version__,
        "alpha": alpha,
        "score_at_least": score,
        "rule": {"score_above": KEEP, "nms_iou": NMS_IOU},
        "obfuscator": protected.digest,
        "decoder": decoder is not None,
        **facts,
    }


def _one(
    protected: Protected, image: Image, name: str, out: Path, alpha: float | None, score: float, decoder: Decoder | None
) -> dict[str, Any]:
    """Detect in one image and write its pictures -> its row."""
    z = protected.cut([image])
    size = (image.shape[0], image.shape[1])
    clean = faces_in(protected, protected.reference, z, size).above(score)
    row: dict[str, Any] = {"height": size[0], "width": size[1]}
    if alpha is None:
        _write_picture(out / ANNOTATED / f"{name}.jpg", draw(image, clean))
        return row | {"faces": clean.as_rows(), "clean_faces": clean.as_rows()}
    release = protected.obfuscate(z, alpha)
    found = faces_in(protected, protected.outside, release, size).above(score)
    _write_picture(out / ANNOTATED / f"{name}.jpg", draw(image, found))
    _write_picture(out / SIDE_BY_SIDE / f"{name}.jpg", side_by_side(image, clean, found, release, alpha, decoder))
    bits = float(release.bits[0]) / math.prod(release.sites)
    row |= {"bits_per_site": round(bits, 3), "release_bytes": release.nbytes}
    return row | {"faces": found.as_rows(), "clean_faces": clean.as_rows()}


@torch.inference_mode()
def faces_in(protected: Protected, side: Any, value: Any, size: tuple[int, int]) -> Detections:
    """What a side (`outside`, or `reference` for a clean head output) finds, in a photograph of (height, width)."""
    if side is None:
        raise RequestError("only the trusted side is here", wanted="client and server artefacts")
    found: Detections = protected.postprocess(side(value), size)
    return found


def side_by_side(
    image: Image, clean: Detections, found: Detections, release: Release, alpha: float, decoder: Decoder | None
) -> Image:
    """clean | obfuscated | reconstruction, each fitted into PANEL and captioned; two panels without a decoder."""
    small, scale = fitted(image)
    shown = [
        ("clean", draw(small, _scaled(clean, scale))),
        (f"obfuscated, alpha {alpha:g}", draw(small, _scaled(found, scale))),
    ]
    if decoder is not None:
        shown.append(("what a trained decoder recovers", decoder.reconstruct(release, small.shape[:2])))
    return panels(shown)


def fitted(image: Image) -> tuple[Image, float]:
    """The image as large as PANEL holds it, and by how much it grew."""
    scale = min(PANEL[0] / image.shape[0], PANEL[1] / image.shape[1])
    size = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC), scale


def panels(named: Sequence[tuple[str, Image]]) -> Image:
    """Pictures of one height side by side, each under its caption."""
    return np.concatenate([_captioned(words, picture) for words, picture in named], axis=1)


def _scaled(found: Detections, scale: float) -> Detections:
    return Detections((found.boxes * scale).astype(np.float32), found.scores)


def _captioned(words: str, picture: Image) -> Image:
    """The picture in the middle of a white panel, its caption above; four pixels of margin."""
    h, w = picture.shape[:2]
    panel = np.full((CAPTION + h + 4, max(NARROWEST, w) + 8, 3), 255, np.uint8)
    left = (panel.shape[1] - w) // 2
    panel[CAPTION : CAPTION + h, left : left + w] = picture
    cv2.putText(panel, words, (6, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1, cv2.LINE_AA)
    return panel


def _write_picture(path: Path, picture: Image) -> None:
    if max(picture.shape[:2]) > LONGEST_JPEG:
        scale = LONGEST_JPEG / max(picture.shape[:2])
        size = [max(1, int(side * scale)) for side in picture.shape[1::-1]]
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    write_bytes(path, data.tobytes())


def _done(out: Path, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run of the same kind whose pictures are still there, by name."""
    try:
        saved = json.loads((out / LIST).read_text(encoding="utf-8"))
        rows = {row["image"]: row for row in saved["images"]} if saved["run"] == json.loads(json.dumps(run)) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: row for name, row in rows.items() if (out / ANNOTATED / f"{name}.jpg").exists()}


def _save(out: Path, run: dict[str, Any], findings: Findings) -> None:
    document = {"run": run, "images": findings.rows, "failed": findings.failed}
    write_bytes(out / LIST, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["image", "alpha", "x1", "y1", "x2", "y2", "score"])
    table.writerows(_lines(run, findings))
    write_bytes(out / TABLE, text.getvalue().encode("utf-8", "backslashreplace"))


def _lines(run: dict[str, Any], findings: Findings) -> Iterator[list[Any]]:
    alpha = "" if run["alpha"] is None else run["alpha"]
    for row in findings.rows:
        for face in row["faces"]:
            yield [row["image"], alpha, *face.values()]
