"""For notebooks: photographs side by side, and a slider over alpha that shows what each alpha finds and what it hides.

    explore(protected, image)      a slider where ipywidgets is installed, the picture it would show where it is not

The head runs once. A move of the slider to a new alpha costs one release, one run of the outside and one of the
attacker's decoder; to an alpha seen before, nothing: the release made then is shown again. What is shown holds the
photograph itself, so a notebook with its outputs belongs inside the trust zone.
"""

import json
import math
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2

from sfumato import detecting
from sfumato.attack.decoder import Decoder
from sfumato.core import channel
from sfumato.core.errors import ArtefactError, RequestError
from sfumato.core.release import Release
from sfumato.core.task import Image
from sfumato.demo import decoder_of
from sfumato.measurement import Measurement
from sfumato.tasks.detection.boxes import Detections
from sfumato.trusted.protect import Protected

LOWEST, HIGHEST, STEP = 0.05, 0.95, 0.05  # of the slider: TR-4928's range
SCORE = 0.5  # from which a detection is drawn, as in the demo
QUALITY = 85  # of JPEG
_NEAR = 1e-6  # two alphas nearer than this are one


@dataclass(frozen=True)
class Picture:
    """A JPEG, as a notebook shows it."""

    jpeg: bytes

    def _repr_jpeg_(self) -> bytes:
        return self.jpeg


def show(named: Mapping[str, Image]) -> Picture:
    """Captions and BGR photographs of one size -> one picture of them side by side. Raises RequestError."""
    if not named or len({image.shape[:2] for image in named.values()}) != 1:
        raise RequestError(
            f"{len(named)} photographs of {len({image.shape[:2] for image in named.values()})} sizes",
            wanted="one photograph or more, of one size",
        )
    return _picture(detecting.panels([(words, detecting.fitted(image)[0]) for words, image in named.items()]))


@dataclass(frozen=True, eq=False)
class View:
    """One alpha: the release, what was found in it, the picture, and what is said below it."""

    alpha: float
    release: Release
    found: Detections
    picture: Picture
    says: tuple[str, ...]


def explore(
    protected: Protected,
    image: Image,
    *,
    alpha: float = 0.8,
    decoder: Decoder | None = None,
    table: Measurement | str | Path | None = None,
    score: float = SCORE,
) -> "Explorer":
    """A slider over alpha on one photograph; show it as the last line of a cell.

    `decoder` is the attacker; None takes the one that ships, where it was trained against this obfuscator. `table` is
    what `sfumato.measure` returned, or a file of `sfumato measure --sweep --json`: the AP shown comes from there.
    Raises AlphaError, and RequestError for a task that finds no boxes or a table of another obfuscator.
    """
    return Explorer(protected, image, alpha, decoder or _shipped(protected), _rows(table, protected), score)


class Explorer:
    """What `explore` gives: `at(alpha)` is what the slider shows there, `widget` the slider."""

    def __init__(
        self, protected: Protected, image: Image, alpha: float, decoder: Decoder | None, table: dict[str, Any],
        score: float,
    ) -> None:  # fmt: skip
        channel.as_alpha(alpha, 1)
        self.protected, self.image, self.alpha = protected, image, alpha
        self.decoder, self.table, self.score = decoder, table, score
        self._z = protected.cut([image])
        self._clean = self._found(protected.reference, self._z)
        self._seen: dict[float, View] = {}
        self._widget: Any = None

    def at(self, alpha: float) -> View:
        """The view at alpha, made when it is first asked for. Raises AlphaError."""
        alpha = round(alpha, 6)
        if alpha not in self._seen:
            self._seen[alpha] = self._view(alpha)
        return self._seen[alpha]

    @property
    def widget(self) -> Any:
        """The slider with picture and figures below it, an ipywidgets.VBox. Raises RequestError without ipywidgets."""
        if self._widget is None:
            self._widget = self._built()
        return self._widget

    def _view(self, alpha: float) -> View:
        release = self.protected.obfuscate(self._z, alpha)
        found = self._found(self.protected.outside, release)
        shown = detecting.side_by_side(self.image, self._clean, found, release, alpha, self.decoder)
        return View(alpha, release, found, _picture(shown), tuple(self._says(release, found, alpha)))

    def _found(self, side: Any, value: Any) -> Detections:
        found: Any = detecting.faces_in(self.protected, side, value, self.image.shape[:2])
        if not isinstance(found, Detections):
            raise RequestError(f"task {self.protected.task.name}", wanted="a task that finds boxes in photographs")
        return found.above(self.score)

    def _says(self, release: Release, found: Detections, alpha: float) -> list[str]:
        bits = float(release.bits[0])
        most = f"at most {bits / math.prod(release.sites):.1f} bits a site, {bits:,.0f} bits in all"
        lines = [
            f"alpha {alpha:g}: {most}; {release.nbytes:,} bytes leave",
            f"{len(found)} found, {len(self._clean)} without obfuscation (score at least {self.score:g})",
        ]
        lines += _precision(self.table, alpha)
        if self.decoder is None:
            return [*lines, "no decoder was trained against this obfuscator, so none is shown"]
        return [*lines, "the attacker is one small decoder: others may recover more"]

    def _built(self) -> Any:
        try:
            import ipywidgets as widgets
        except ImportError as error:
            raise RequestError(
                "no ipywidgets in this environment", wanted="the slider", do="pip install sfumato[notebook]"
            ) from error
        slider = widgets.FloatSlider(
            self.alpha,
            min=LOWEST,
            max=HIGHEST,
            step=STEP,
            description="alpha",
            readout_format=".2f",
            layout=widgets.Layout(width="60%"),
        )
        slider.add_class("sfumato-alpha")
        picture = widgets.Image(format="jpeg", layout=widgets.Layout(max_width="100%"))
        below = widgets.HTML()

        def move(_change: Any = None) -> None:
            view = self.at(slider.value)
            picture.value, below.value = view.picture.jpeg, _lines(view)

        slider.observe(move, "value")
        move()
        return widgets.VBox([slider, picture, below])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The live widget, and beside it the picture for readers without one: nbviewer, PDF, mail."""
        view = self.at(self.alpha)
        jpeg = b64encode(view.picture.jpeg).decode()
        static = {
            "text/plain": "\n".join(view.says),
            "text/html": f'<img src="data:image/jpeg;base64,{jpeg}" style="max-width: 100%">{_lines(view)}',
            "image/jpeg": jpeg,
        }
        try:
            live: dict[str, Any] = self.widget._repr_mimebundle_()
        except RequestError:
            return static
        return {**live, **static}


def _lines(view: View) -> str:
    return "<br>".join(map(escape, view.says))


def _picture(image: Image) -> Picture:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return Picture(data.tobytes())


def _shipped(protected: Protected) -> Decoder | None:
    try:
        return decoder_of(None, protected)
    except ArtefactError:  # of another obfuscator
        return None


def _rows(table: Measurement | str | Path | None, protected: Protected) -> dict[str, Any]:
    """What a measurement holds as JSON does; {} for none."""
    if table is None or isinstance(table, Measurement):
        return table.as_dict() if table else {}
    try:
        read: dict[str, Any] = json.loads(Path(table).read_text(encoding="utf-8"))
        of, known = read["facts"]["obfuscator"], [row["ap"] for row in read["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{table}: no table of a measurement", wanted="a file of", do="sfumato measure --sweep --json FILE"
        ) from error
    if of != protected.digest or not known:
        raise RequestError(f"a table of obfuscator {of[:12]}", wanted=f"one of {protected.digest[:12]}, which is shown")
    return read


def _precision(table: dict[str, Any], alpha: float) -> list[str]:
    """AP at alpha, or at the alphas measured on either side of it; nothing in between is made up."""
    if not table:
        return []
    measured = sorted((row["alpha"], row["ap"]) for row in table["rows"] if row["alpha"] is not None)
    clean = [f"{row['ap']:.4f} clean" for row in table["rows"] if row["alpha"] is None]
    here = [pair for pair in measured if abs(pair[0] - alpha) < _NEAR]
    near = here or [p for p in measured if p[0] < alpha][-1:] + [p for p in measured if p[0] > alpha][:1]
    said = ", ".join([*(f"{ap:.4f} at alpha {a:g}" for a, ap in near), *clean])
    return [f"AP measured on {table['images']} photographs with {table['faces']} faces: {said}"]
