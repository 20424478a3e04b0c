"""A small set in FDDB's layout, composed from photographs that this project's dependencies ship: no download.

For a first run, a demo and tests where FDDB is absent. Three kinds of picture, drawn by a seeded generator:

    scene     one or two of two people, cut out of their portraits, before a photographed place
    portrait  one of the two portraits itself, turned, mirrored and cropped
    prints    small grey and coloured prints of faces lying on a photographed surface

Every face keeps its ellipse: measured by hand on the portraits, taken along by each similarity M = [A | t] as

    centre' = A centre + t,   axes' = |A| axes,   angle' = atan2(A (cos angle, sin angle))

Figures on this set show that things work; they are no figures on FDDB. SAMPLER.md in the folder says what is in it.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from sfumato.core.errors import DatasetError, OutputError, RequestError
from sfumato.datasets import images as files
from sfumato.datasets.fddb import FOLDS, LISTS, PICTURES

WIDTH, HEIGHT = 450, 300  # about the size of FDDB's pictures
QUALITY = 95
NOTE = "SAMPLER.md"

# Outlines and faces measured by hand on the pictures, in their own pixels. A face is (major, minor, angle, cx, cy)
# as FDDB draws them: from the chin to where the hair begins on top, and out to the ears.
UPRIGHT = math.pi / 2
# fmt: off
ASTRONAUT = (
    (60, 512), (40, 495), (25, 470), (19, 430), (19, 400), (25, 365), (31, 325), (45, 280), (66, 247), (96, 217),
    (113, 206), (116, 188), (127, 168), (146, 154), (165, 150), (180, 149), (182, 133), (171, 126), (159, 111),
    (154, 85), (157, 61), (171, 46), (191, 31), (215, 19), (240, 17), (264, 23), (284, 41), (297, 65), (300, 90),
    (294, 110), (280, 125), (270, 134), (262, 150), (257, 174), (272, 182), (289, 201), (302, 230), (306, 240),
    (320, 248), (337, 264), (349, 290), (357, 320), (361, 348), (380, 345), (410, 345), (438, 356), (463, 378),
    (479, 405), (489, 430), (496, 455), (502, 465), (511, 490), (511, 512),
)
HOPPER = (
    (11, 600), (16, 540), (26, 450), (37, 410), (52, 386), (77, 367), (112, 361), (151, 351), (181, 336), (200, 318),
    (192, 300), (171, 285), (162, 265), (164, 240), (156, 215), (154, 195), (161, 170), (159, 150), (154, 130),
    (153, 110), (161, 93), (176, 81), (181, 66), (196, 49), (220, 39), (240, 26), (262, 24), (284, 31), (303, 44),
    (325, 52), (344, 66), (352, 87), (364, 90), (370, 110), (371, 140), (369, 180), (374, 190), (370, 220),
    (361, 255), (358, 275), (349, 297), (338, 307), (333, 316), (350, 331), (380, 351), (420, 366), (460, 378),
    (489, 393), (499, 415), (509, 445), (512, 452), (512, 600),
)
# fmt: on
ASTRONAUT_FACE = (69.0, 47.0, UPRIGHT, 225.0, 117.0)
HOPPER_FACE = (111.0, 91.0, UPRIGHT, 264.0, 223.0)
SUBSET_FACE = (12.5, 9.5, UPRIGHT, 12.0, 12.5)  # in every 25 x 25 picture of lfw_subset; its first hundred are faces
SUBSET_FACES = 100

PLACES = ("china.jpg", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg", "flower.jpg", "chelsea.png")
SURFACES = ("brick.png", "gravel.png", "grass.png", "coffee.png")


@dataclass(frozen=True, eq=False)
class Layer:
    """A picture [h, w, 3] float32 in 0..255, how much of each pixel is kept [h, w], and its faces [n, 5]."""

    image: np.ndarray
    alpha: np.ndarray
    faces: np.ndarray


@dataclass(frozen=True, eq=False)
class Sources:
    """The photographs a set is composed from."""

    people: tuple[Layer, ...]
    subset: np.ndarray
    places: tuple[np.ndarray, ...]
    surfaces: tuple[np.ndarray, ...]


def compose(folder: str | os.PathLike[str], *, images: int = 60, seed: int = 0) -> Path:
    """Write the set into a new or empty folder (one that holds this very set is left as it is); its path.

    The same seed gives the same bytes under the same versions of the packages. Raises OutputError for a folder that
    holds something else or cannot be written, DatasetError where the packages' photographs are absent.
    """
    if images < FOLDS:
        raise RequestError(f"{images} images for {FOLDS} folds", wanted=f"at least {FOLDS} images")
    target, note = Path(os.path.abspath(folder)), _note(images, seed)
    if _holds(target, note):
        return Path(folder)
    sources = _sources()
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        _write(part, sources, images, seed)
        (part / NOTE).write_text(note, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        raise OutputError(f"{os.fspath(folder)}: cannot be written ({error.strerror})", do="give another") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Path(folder)


def picture(sources: Sources, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One composed picture, [HEIGHT, WIDTH, 3] uint8 BGR, and its faces [n, 5]."""
    kinds: tuple[Callable[[Sources, np.random.Generator], Layer], ...] = (_scene, _portrait, _prints)
    layer = kinds[int(rng.choice(3, p=(0.5, 0.2, 0.3)))](sources, rng)
    image = layer.image
    if rng.random() < 0.1:
        image = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    grain = rng.normal(0, rng.uniform(0.5, 2.5), image.shape)  # the noise of one sensor over all layers
    return (image + grain).clip(0, 255).round().astype(np.uint8), layer.faces


def _holds(target: Path, note: str) -> bool:
    """Whether the folder is this set already; refuses one that is anything else but empty."""
    try:
        if (target / NOTE).is_file() and (target / NOTE).read_text(encoding="utf-8") == note:
            return True
        free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except (OSError, UnicodeDecodeError):
        free = False
    if not free:
        raise OutputError(f"{target}: holds something else", wanted="a new or an empty folder", do="give another")
    return False


def _write(part: Path, sources: Sources, images: int, seed: int) -> None:
    pictures, lists = part / PICTURES / "sampler", part / LISTS
    for made in (pictures, lists):
        made.mkdir(parents=True)
    folds: list[list[str]] = [[] for _ in range(FOLDS)]
    names: list[list[str]] = [[] for _ in range(FOLDS)]
    for number in range(images):
        image, faces = picture(sources, np.random.default_rng([seed, number]))
        name = f"sampler/img_{number + 1:04d}"
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        (part / PICTURES / f"{name}.jpg").write_bytes(jpeg.tobytes())
        rows = [" ".join(f"{value:.6f}" for value in face) + "  1" for face in faces]
        folds[number % FOLDS] += [name, str(len(rows)), *rows]
        names[number % FOLDS].append(name)
    for number, (fold, listed) in enumerate(zip(folds, names, strict=True), start=1):
        (lists / f"FDDB-fold-{number:02d}-ellipseList.txt").write_text("\n".join(fold) + "\n", encoding="ascii")
        (lists / f"FDDB-fold-{number:02d}.txt").write_text("\n".join(listed) + "\n", encoding="ascii")


def _scene(sources: Sources, rng: np.random.Generator) -> Layer:
    """People before a place: the smaller stands behind, all are cut by the lower edge, no face is hidden."""
    place = sources.places[rng.integers(len(sources.places))]
    canvas = _backdrop(place, rng, blur=rng.uniform(0.3, 1.8))
    people = [sources.people[i] for i in rng.permutation(len(sources.people))[: rng.integers(1, 3)]]
    heights = sorted(np.exp(rng.uniform(math.log(38), math.log(125), len(people))))
    for person, height in zip(people, heights, strict=True):
        scaled = _jittered(_scaled(person, height / (2 * person.faces[0, 0])), rng)
        canvas = _placed(canvas, scaled, partial(_standing, scaled, rng))
    return canvas


def _portrait(sources: Sources, rng: np.random.Generator) -> Layer:
    """A portrait as it is, its own background filling the picture."""
    whole = sources.people[rng.integers(len(sources.people))]
    h, w = whole.alpha.shape
    fill = rng.uniform(1.02, 1.35) * WIDTH / w
    layer = _jittered(_scaled(replace(whole, alpha=np.ones_like(whole.alpha)), fill), rng)
    major, _, _, cx, cy = layer.faces[0]
    # The middle of the crop: near the face, all of which stays inside, and not beyond the photograph.
    x = np.clip(cx + rng.uniform(-0.25, 0.25) * WIDTH, WIDTH / 2, w * fill - WIDTH / 2)
    y = np.clip(cy + rng.uniform(-1, 1) * (HEIGHT / 2 - major), HEIGHT / 2, h * fill - HEIGHT / 2)
    move = cv2.getRotationMatrix2D((float(x), float(y)), rng.uniform(-7, 7), 1.0)
    move[:, 2] += (WIDTH / 2 - x, HEIGHT / 2 - y)
    image = cv2.warpAffine(layer.image, move, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return Layer(image, np.ones((HEIGHT, WIDTH), np.float32), _moved(layer.faces, move))


def _prints(sources: Sources, rng: np.random.Generator) -> Layer:
    """Prints on a surface: grey ones of lfw_subset, some in colour of the two people; none lies on another's face."""
    surface = sources.surfaces[rng.integers(len(sources.surfaces))]
    canvas = _backdrop(surface, rng, blur=rng.uniform(0.0, 0.8))
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.4:
            printed = _colour_print(sources.people[rng.integers(len(sources.people))], rng)
        else:
            tile = sources.subset[rng.integers(len(sources.subset))]
            height = rng.uniform(28, 44)
            printed = _framed(_scaled(_tile(tile), height / (2 * SUBSET_FACE[0])), rng)
        canvas = _placed(canvas, printed, partial(_lying, printed, rng))
    return canvas


def _tile(tile: np.ndarray) -> Layer:
    grey = np.repeat((tile * 255).astype(np.float32)[..., None], 3, axis=2)
    return Layer(grey, np.ones(tile.shape, np.float32), np.array([SUBSET_FACE]))


def _colour_print(person: Layer, rng: np.random.Generator) -> Layer:
    """Head and shoulders of a portrait as a framed print; its face 40 to 85 pixels high."""
    major, _, _, cx, cy = person.faces[0]
    x1, y1, x2, y2 = (int(v) for v in (cx - 1.5 * major, cy - 1.6 * major, cx + 1.5 * major, cy + 2.0 * major))
    x1, y1 = max(x1, 0), max(y1, 0)
    image = person.image[y1:y2, x1:x2]
    faces = person.faces - np.array([0, 0, 0, x1, y1])
    cropped = Layer(image, np.ones(image.shape[:2], np.float32), faces)
    return _framed(_jittered(_scaled(cropped, rng.uniform(40, 85) / (2 * major)), rng), rng)


def _framed(layer: Layer, rng: np.random.Generator) -> Layer:
    """A white border round a print, as wide as a laboratory leaves it."""
    border = int(max(3, 0.06 * layer.alpha.shape[0]))
    paper = rng.uniform(205, 245)
    h, w = layer.alpha.shape
    image = np.full((h + 2 * border, w + 2 * border, 3), paper, np.float32)
    image[border:-border, border:-border] = layer.image
    return Layer(image, np.ones(image.shape[:2], np.float32), layer.faces + np.array([0, 0, 0, border, border]))


def _backdrop(photograph: np.ndarray, rng: np.random.Generator, *, blur: float) -> Layer:
    """A crop of a photograph, at least 70 % of what fits, scaled to the picture and a little out of focus."""
    h, w = photograph.shape[:2]
    share = rng.uniform(0.7, 1.0) * min(h / HEIGHT, w / WIDTH)
    ch, cw = int(share * HEIGHT), int(share * WIDTH)
    y, x = rng.integers(h - ch + 1), rng.integers(w - cw + 1)
    crop = cv2.resize(photograph[y : y + ch, x : x + cw], (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    if blur > 0.2:
        crop = cv2.GaussianBlur(crop, (0, 0), blur)
    layer = Layer(crop.astype(np.float32), np.ones((HEIGHT, WIDTH), np.float32), np.empty((0, 5)))
    return _jittered(layer, rng)


def _jittered(layer: Layer, rng: np.random.Generator) -> Layer:
    """Mirrored or not; contrast, brightness and warmth moved a little."""
    contrast, light, warmth = rng.uniform(0.8, 1.1), rng.uniform(-18, 14), rng.uniform(-0.04, 0.04)
    tint = np.array([1 - warmth, 1.0, 1 + warmth], np.float32)
    image = (((layer.image - 128) * contrast + 128 + light) * tint).clip(0, 255).astype(np.float32)
    if rng.random() < 0.5:
        return Layer(image, layer.alpha, layer.faces)
    flip = np.array([[-1.0, 0.0, image.shape[1] - 1.0], [0.0, 1.0, 0.0]])
    return Layer(image[:, ::-1].copy(), layer.alpha[:, ::-1].copy(), _moved(layer.faces, flip))


def _scaled(layer: Layer, scale: float) -> Layer:
    """Resized, [h, w] -> [scale h, scale w]; pixel centres, where ellipses are measured, move with the pixels."""
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    h, w = layer.alpha.shape
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    image = cv2.resize(layer.image, size, interpolation=how).clip(0, 255)
    alpha = cv2.resize(layer.alpha, size, interpolation=how).clip(0, 1)
    shift = (scale - 1) / 2
    return Layer(image, alpha, _moved(layer.faces, np.array([[scale, 0, shift], [0, scale, shift]])))


def _standing(layer: Layer, rng: np.random.Generator) -> np.ndarray:
    """Where a person stands: the whole face inside, the outline's lower edge at or below the picture's."""
    h = layer.alpha.shape[0]
    major, minor, _, cx, cy = layer.faces[0]
    x = rng.uniform(minor * 1.3, WIDTH - minor * 1.3) - cx
    lowest = HEIGHT - 1.5 * major - cy
    highest = max(HEIGHT - h, 2 - (cy - 1.5 * major))
    return np.array([[1.0, 0.0, x], [0.0, 1.0, rng.uniform(min(highest, lowest), lowest)]])


def _lying(layer: Layer, rng: np.random.Generator) -> np.ndarray:
    """Where a print lies: the whole of it inside, turned by up to 14 degrees."""
    h, w = layer.alpha.shape
    move = cv2.getRotationMatrix2D((w / 2, h / 2), rng.uniform(-14, 14), 1.0)
    reach = 0.5 * math.hypot(h, w)
    move[:, 2] += (rng.uniform(reach, WIDTH - reach) - w / 2, rng.uniform(reach, HEIGHT - reach) - h / 2)
    return move


def _placed(canvas: Layer, layer: Layer, draw: Callable[[], np.ndarray], tries: int = 40) -> Layer:
    """The layer on the canvas at the first drawn place where it hides no face there; left out if there is none."""
    for _ in range(tries):
        move = draw()
        alpha = cv2.warpAffine(layer.alpha, move, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
        if not (_faces_mask(canvas.faces) * (alpha > 0.02)).any():
            return _pasted(canvas, layer, move, alpha)
    return canvas


def _pasted(canvas: Layer, layer: Layer, move: np.ndarray, alpha: np.ndarray) -> Layer:
    image = cv2.warpAffine(
        layer.image, move, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    ).clip(0, 255)
    shadow = cv2.GaussianBlur(np.roll(alpha, (2, 2), axis=(0, 1)), (0, 0), 2.5)[..., None] * 0.25
    under = canvas.image * (1 - shadow)
    mixed = under + alpha[..., None] * (image - under)
    return Layer(mixed, canvas.alpha, np.concatenate([canvas.faces, _moved(layer.faces, move)]))


def _faces_mask(faces: np.ndarray) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for major, minor, angle, cx, cy in faces:
        cv2.ellipse(mask, ((cx, cy), (2 * major, 2 * minor), math.degrees(angle)), 1, -1)
    return mask


def _moved(faces: np.ndarray, move: np.ndarray) -> np.ndarray:
    """Ellipses [n, 5] under a similarity [2, 3]; angles, defined up to half a turn, stay between -pi/2 and pi/2."""
    a, t = move[:, :2], move[:, 2]
    along = a @ np.stack([np.cos(faces[:, 2]), np.sin(faces[:, 2])])
    scale = np.hypot(*along)[:, None]
    angle = np.arctan2(along[1], along[0])
    angle = -((-angle + UPRIGHT) % math.pi - UPRIGHT)
    return np.concatenate([faces[:, :2] * scale, angle[:, None], faces[:, 3:] @ a.T + t], axis=1)


def _sources() -> Sources:
    subset = np.load(_shipped("scikit-image", "skimage", "data/lfw_subset.npy"), allow_pickle=False)
    astronaut = _photograph("astronaut.png")
    hopper = files.read(_shipped("matplotlib", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"))
    people = (_person(astronaut, ASTRONAUT, ASTRONAUT_FACE), _person(hopper, HOPPER, HOPPER_FACE))
    places = tuple(_photograph(name) for name in PLACES)
    return Sources(people, subset[:SUBSET_FACES], places, tuple(_photograph(name) for name in SURFACES))


def _person(image: np.ndarray, outline: tuple[tuple[int, int], ...], face: tuple[float, ...]) -> Layer:
    """A portrait with its outline as alpha, soft over about three pixels."""
    mask = np.zeros(image.shape[:2], np.float32)
    cv2.fillPoly(mask, [np.array(outline, np.int32)], (1.0,), cv2.LINE_AA)
    rows = cv2.copyMakeBorder(mask, 8, 8, 8, 8, cv2.BORDER_REPLICATE)
    soft = cv2.GaussianBlur(cv2.erode(rows, np.ones((3, 3), np.uint8)), (0, 0), 1.2)[8:-8, 8:-8]
    return Layer(image.astype(np.float32), soft, np.array([face]))


def _photograph(name: str) -> np.ndarray:
    if name in ("china.jpg", "flower.jpg"):
        return files.read(_shipped("scikit-learn", "sklearn", f"datasets/images/{name}"))
    return files.read(_shipped("scikit-image", "skimage", f"data/{name}"))


def _shipped(distribution: str, package: str, inside: str) -> Path:
    """A file inside an installed package, found without importing it (and so without its chance to download)."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / inside if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        got = f"{distribution} is not installed" if path is None else f"{distribution} here lacks {inside}"
        raise DatasetError(got, wanted="the photographs it ships", do=f"pip install {distribution}")
    return path


def _note(images: int, seed: int) -> str:
    packages = ("scikit-image", "scikit-learn", "matplotlib", "opencv-python-headless", "numpy")
    return f"""# Sampler: {images} composed images in FDDB's layout, seed {seed}

Made by `sfumato.datasets.sampler.compose`. Not FDDB, and no figure on it is a figure on FDDB: two people's portraits
and a hundred small grey faces return again and again, pasted on a dozen photographs. It shows that things work.

- `originalPics/sampler/*.jpg`: {WIDTH} x {HEIGHT}, JPEG quality {QUALITY}
- `FDDB-folds/`: ten folds, `FDDB-fold-NN.txt` (names) and `FDDB-fold-NN-ellipseList.txt` (faces as ellipses)

| photographs | shipped by | origin and terms |
|---|---|---|
| astronaut (Eileen Collins) | scikit-image | NASA, public domain |
| lfw_subset (100 faces, 25 x 25, grey) | scikit-image | Labeled Faces in the Wild (UMass Amherst, 2007) |
| motorcycle_left, motorcycle_right | scikit-image | Middlebury 2014 stereo benchmark |
| chelsea, coffee, brick, grass, gravel | scikit-image | CC0 |
| rocket | scikit-image | SpaceX, public domain |
| grace_hopper (Grace Hopper) | Matplotlib | US Navy, public domain |
| china, flower | scikit-learn | CC BY 2.0, danielbuechele and vultilion on Flickr; cropped, recoloured, overlaid |

Packages: {", ".join(f"{name} {_version(name)}" for name in packages)}.
The same seed under these versions gives the same bytes.
"""


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(absent)"
