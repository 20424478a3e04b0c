"""The demo's page: whole in one file, every figure from the report beside it, and no claim beyond them."""

import json
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sfumato import __version__, demo, facade
from sfumato.attack import decoder as attacker
from sfumato.attack.decoder import Decoder
from sfumato.core.errors import OutputError, RequestError
from sfumato.datasets import fddb, sampler
from sfumato.measurement import Seeded, measure
from sfumato.tasks.detection.task import FaceDetection
from sfumato.trusted.protect import Protected

ALPHAS = (0.4, 0.95)
IMAGES, SEED = 10, 3
DASH = "\N{EN DASH}"


class Page(HTMLParser):
    """Tags with their attributes, the sweep's cells row by row, and all text but the style's."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._sweep = self._cell = self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._sweep |= dict(attrs).get("id") == "sweep"
        self._style |= tag == "style"
        if self._sweep and tag == "tr":
            self.rows.append([])
        if self._sweep and tag in ("th", "td"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._sweep &= tag != "table"
        self._style &= tag != "style"
        self._cell &= tag not in ("th", "td", "small")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data
        if self._cell:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def said(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def pair(tiny: Any) -> tuple[Protected, Decoder]:
    protected = facade.load(tiny.folder, weights=tiny.weights, task=FaceDetection(size=(tiny.size, tiny.size)))
    decoder = demo.decoder_of(tiny.folder, protected)
    assert decoder is not None
    return protected, decoder


@pytest.fixture(scope="module")
def made(pair: tuple[Protected, Decoder], tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    out = tmp_path_factory.mktemp("made") / "demo"
    return demo.run(*pair, out, images=IMAGES, seed=SEED, alphas=ALPHAS, options=["--size", "256"], quiet=True)


@pytest.fixture(scope="module")
def page(made: demo.Demo) -> Page:
    return Page(made.page.read_text(encoding="utf-8"))


def strict(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_page_needs_nothing_but_itself(made: demo.Demo, page: Page) -> None:
    assert {name for name, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    for _, attrs in page.tags:
        assert not {"href", "srcset", "action"} & set(attrs)
        assert (attrs.get("src") or "data:image/").startswith("data:image/")
    text = made.page.read_text(encoding="utf-8")
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert len(text) < 3_000_000


def test_every_photograph_has_its_row_at_every_alpha(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 3 * (1 + 1 + 4 * len(ALPHAS))
    for image in images:
        assert len(image["alt"] or "") > 10
        kind, data = (image["src"] or "").split(";base64,")
        picture = cv2.imdecode(np.frombuffer(b64decode(data), np.uint8), cv2.IMREAD_UNCHANGED)
        assert picture is not None
        assert kind in ("data:image/jpeg", "data:image/png")
        assert picture.shape[0] == picture.shape[1]
    for alpha in ("0.4", "0.95"):
        assert sum(attrs.get("data-alpha") == alpha for _, attrs in page.tags) == 3
        for said in (
            "detection from the obfuscated release",
            "codes that leave",
            "what the decoder recovers",
            "the face as",
        ):
            assert sum(said in (i["alt"] or "") and f"at alpha {alpha}" in (i["alt"] or "") for i in images) == 3
    for name in ("Astronaut", "Grace Hopper", "Composed scene"):
        assert sum((i["alt"] or "").startswith(name) for i in images) == 2 + 4 * len(ALPHAS)


def test_a_radio_an_alpha_and_one_is_chosen(page: Page) -> None:
    radios = page.all("input")
    assert [r["id"] for r in radios] == ["alpha-1", "alpha-2", "alpha-all"]
    assert {r["name"] for r in radios} == {"alpha"}
    assert [r["id"] for r in radios if "checked" in r] == ["alpha-2"]  # .95 is nearer to .8 than .4 is


def test_the_table_is_the_reports(made: demo.Demo, page: Page) -> None:
    report = strict(made.json)
    assert report == made.report | {"measurement": report["measurement"], "table": report["table"]}
    measured = report["measurement"]["rows"]
    assert [row["alpha"] for row in measured] == [None, *ALPHAS]
    assert len(page.rows) == 1 + len(measured)
    for cells, row in zip(page.rows[1:], measured, strict=True):
        seen = [at["psnr"] for one in report["pictures"] for at in one["at"] if at["alpha"] == row["alpha"]]
        flat = np.mean([one["flat_psnr"] for one in report["pictures"]])
        assert [cell.strip() for cell in cells] == [
            "clean" if row["alpha"] is None else f"{row['alpha']:g}",
            f"{row['ap']:.4f}",
            f"{row['drop'][0]:.4f}" if row["drop"] else DASH,
            "no bound" if row["bits_per_site"] is None else f"{row['bits_per_site']:.1f}",
            f"{row['release_bytes'] / 1000:.1f}",
            f"{np.mean(seen):.1f}" if seen else DASH,
            f"{flat:.1f}",
        ]


def test_the_figures_are_the_sweeps_of_that_data(
    made: demo.Demo, pair: tuple[Protected, Decoder], tmp_path: Path
) -> None:
    data = fddb.load(sampler.compose(tmp_path / "again", images=IMAGES, seed=SEED))
    again = measure(pair[0], data, alphas=(None, *ALPHAS), seeds=(SEED,), quiet=True)
    rows = made.report["measurement"]["rows"]
    assert [row["ap"] for row in rows] == [arm.detected.mean for arm in again.arms]
    # a channel whose few codes all round to 0 does not travel, and the noise decides that anew
    sizes = [arm.release_bytes for arm in again.arms]
    assert [row["release_bytes"] for row in rows] == pytest.approx(sizes, rel=0.02)
    assert made.report["data"] == {"name": "sampler", "images": IMAGES, "faces": data.faces, "seed": SEED}


def test_detections_shown_pass_the_one_threshold_in_both_arms(made: demo.Demo) -> None:
    for one in made.report["pictures"]:
        for found in (one["clean"], *(at["detections"] for at in one["at"])):
            assert all(face["score"] >= made.report["threshold"] for face in found)
    assert any(one["clean"] for one in made.report["pictures"])


def test_the_page_says_what_it_is_and_no_more(made: demo.Demo, page: Page) -> None:
    report = made.report
    for said in (
        f"{IMAGES} pictures with {report['data']['faces']} faces, seed {SEED}",
        "not evidence of accuracy or of privacy",
        "What leaves in clear: the detections",
        "nothing about stronger attackers",
        "scikit-image, scikit-learn and Matplotlib",
        "CC BY 2.0, danielbuechele and vultilion on Flickr",
        report["digest"],
        f"sfumato {__version__}",
        f"PyTorch {torch.__version__}",
        f"sfumato demo --out demo --images {IMAGES} --seed {SEED} --size 256",
    ):
        assert said in page.said
    assert "anonym" not in page.said.lower()
    assert "irreversib" not in page.said.lower()


def test_without_a_decoder_the_page_says_so_and_figures_repeat(
    made: demo.Demo, pair: tuple[Protected, Decoder], tmp_path: Path
) -> None:
    bare = demo.run(pair[0], None, tmp_path, images=IMAGES, seed=SEED, alphas=ALPHAS, quiet=True)
    page = Page(bare.page.read_text(encoding="utf-8"))
    assert page.said.count("No decoder was trained against these artefacts") == 3 * len(ALPHAS)
    assert "There is no decoder for these artefacts" in page.said
    assert len(page.all("img")) == 3 * (1 + 2 * len(ALPHAS))
    assert {row["psnr"] for row in strict(bare.json)["table"]} == {None}
    for one, other in zip(made.report["pictures"], bare.report["pictures"], strict=True):
        assert one["clean"] == other["clean"]
        assert [at["detections"] for at in one["at"]] == [at["detections"] for at in other["at"]]
    assert [row["ap"] for row in made.report["table"]] == [row["ap"] for row in bare.report["table"]]


def test_another_seed_is_other_data_beside_the_first(pair: tuple[Protected, Decoder], tmp_path: Path) -> None:
    first = sampler.compose(tmp_path / demo.DATA / f"{IMAGES}-images-seed-0", images=IMAGES, seed=0)
    demo.run(pair[0], None, tmp_path, images=IMAGES, seed=1, alphas=(0.8,), quiet=True)
    assert len(list((tmp_path / demo.DATA).iterdir())) == 2
    assert strict(tmp_path / demo.REPORT)["data"]["faces"] != fddb.load(first).faces


def test_a_picture_of_the_codes_is_the_codes(pair: tuple[Protected, Decoder], astronaut: np.ndarray) -> None:
    protected, _ = pair
    release = protected.with_noise(Seeded(0)).obfuscate(protected.cut([astronaut]), 0.6)
    data = b64decode(demo._codes(protected, release).split(",")[1])
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture is not None
    shape, side = protected.obfuscator.shape, release.sites[0]
    order = protected.obfuscator.allocation(release.alpha)[0].view(shape.k, -1).sum(1).argsort(descending=True)
    assert shape.block > 1
    for place in (0, 1, 5):
        y, x = (index * (side + demo.SEAM) for index in divmod(place, demo.ACROSS))
        tile = picture[y : y + side, x : x + side].astype(int) - 128
        s, channel = shape.block, release.tensor[0].view(shape.k, shape.block**2, *release.tensor.shape[2:])
        for row, column in ((0, 0), (3, 5), (side - 1, 2)):  # a coefficient lies where its site would
            want = channel[order[place], row % s * s + column % s, row // s, column // s]
            assert tile[row, column] == want


def test_recovered_pictures_score_as_the_attack_scores_them(
    pair: tuple[Protected, Decoder], astronaut: np.ndarray
) -> None:
    protected, decoder = pair
    release = protected.with_noise(Seeded(1)).obfuscate(protected.cut([astronaut]), 0.6)
    views: dict[str, str] = {}
    psnr = demo._recover(decoder, release, astronaut, ((0, 0, 512), (180, 50, 100)), views)
    side = attacker.UP * release.sites[0]
    truth = cv2.resize(astronaut, (side, side), interpolation=cv2.INTER_AREA).astype(float)
    picture = decoder.reconstruct(release, (side, side))
    assert psnr == pytest.approx(10 * np.log10(255**2 / ((picture - truth) ** 2).mean()), abs=0.05)
    flat = attacker.psnr(*demo._flat(astronaut, release.sites))
    assert flat == pytest.approx(10 * np.log10(255**2 / truth.var((0, 1)).mean()), abs=0.05)
    whole = cv2.imdecode(np.frombuffer(b64decode(views["recovered"].split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
    assert whole is not None
    large = cv2.resize(picture, (demo.SIDE, demo.SIDE), interpolation=cv2.INTER_CUBIC)
    assert attacker.psnr(whole, large) > 30


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_stays_inside_and_holds_the_faces_that_fit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = tuple(int(side) for side in draw.integers(60, 600, 2))
    corner, extent = draw.uniform(0, 0.6, (2, 2)) * size[::-1], draw.uniform(0.05, 0.39, (2, 2)) * size[::-1]
    faces = np.concatenate([corner, corner + extent], axis=1)
    x, y, side = demo._window((size[0], size[1]), faces, demo.ROOM)
    assert min(x, y) >= 0
    assert x + side <= size[1]
    assert y + side <= size[0]
    low, high = faces[:, :2].min(0), faces[:, 2:].max(0)
    if 1.2 * (high - low).max() < min(size):
        assert (low >= np.array([x, y]) - 1).all()
        assert (high <= np.array([x, y]) + side + 1).all()


def test_the_scene_shown_has_several_faces_near_each_other() -> None:
    def entry(*faces: tuple[float, float, float, float]) -> Any:
        return SimpleNamespace(boxes=np.array(faces, float))

    one = entry((0, 0, 200, 200))
    apart = entry((0, 0, 90, 90), (350, 100, 440, 190))
    small, large = entry((0, 0, 30, 30), (50, 0, 150, 90)), entry((0, 0, 50, 50), (60, 0, 120, 60))
    assert max([one, apart, small, large], key=demo._telling) is large
    assert max([one, apart], key=demo._telling) is one


def test_a_wrong_request_is_said_before_the_work(pair: tuple[Protected, Decoder], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="seed -1"):
        demo.run(*pair, tmp_path, seed=-1)
    with pytest.raises(RequestError, match="9 images for 10 folds"):
        demo.run(*pair, tmp_path, images=9)
    (tmp_path / "file").write_text("-", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        demo.run(*pair, tmp_path / "file")
