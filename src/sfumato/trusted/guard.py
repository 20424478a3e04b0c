"""The only door of the trust zone: what this guard did not make, enter and find unchanged does not leave.

    release = guard(record, alpha)      obfuscated, entered in the ledger, then handed out; or LedgerError, and nothing
    data    = guard.open(release)       its bytes for the wire; or GuardError, and nothing

A guard knows the releases it made by identity and by a digest of their bytes, so that a tensor, a picture, a release
made by hand or elsewhere, a copy, or one changed since does not pass: everything is refused that is not known to be
right. An entry is on the disk before the release exists for anyone else, so no kill can lose one that left.
"""

import hashlib
import os
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from sfumato.core import channel
from sfumato.core.errors import GuardError, RequestError
from sfumato.core.release import Release
from sfumato.core.task import Image
from sfumato.trusted import record
from sfumato.trusted.ledger import Entry, Ledger
from sfumato.trusted.noise import SHARED, Fresh, Keyed
from sfumato.trusted.protect import Protected
from sfumato.trusted.session import Session


class Guard:
    """Releases of `protected`, every one counted in `ledger` under a code of its record, hashed with `key`.

    `key` (32 bytes) names records in the ledger: with another key the ledger takes them for others, so it does not
    rotate. Near-duplicates of a picture count as one record (`trusted.record`).
    """

    def __init__(self, protected: Protected, ledger: Ledger, key: bytes) -> None:
        if len(key) != record.KEY_BYTES:
            got = f"a key of {len(key)} bytes"
            raise RequestError(got, wanted=f"{record.KEY_BYTES} bytes", do="sfumato key FILE")
        self.protected, self.ledger, self._key = protected, ledger, key
        self._made: dict[int, tuple[weakref.ref[Release], bytes]] = {}
        self._bits_after = lru_cache(4096)(self._composed)

    def __call__(self, what: Image | Sequence[Image], alpha: channel.Alpha = 0.8) -> Release:
        """One record or several of one input size -> their release, all of them entered.

        Raises AlphaError, ImageError, PolicyError where one of them is past the policy, and LedgerError: then none is
        released.
        """
        records = [what] if isinstance(what, np.ndarray) else list(what)
        release = self.protected(records, alpha)
        sites = self.protected.obfuscator.shape.coded(release.sites)
        alphas = release.alpha.tolist()
        series = self._series(release.sites)
        entries = [
            Entry(
                record=record.named(self._key, one),
                draw=self._draw(one, value, release.sites),
                artefact=release.digest,
                alpha=value,
                epoch=self._epoch,
                series=series,
                bits_after=lambda k, value=value: self._bits_after(value, sites, k),  # type: ignore[misc]
            )
            for one, value in zip(records, alphas, strict=True)
        ]
        self.ledger.enter(entries)
        return self._known(release)

    def session(self, camera: str, alpha: float = 0.8) -> Callable[[Image], Release]:
        """For the frames of one camera: `Session` on fresh noise, with the camera as one record of the ledger.

        Sessions of a camera add up under its name, which the ledger knows by a keyed hash. Raises as a call does.
        """
        session = Session(self.protected.with_noise(Fresh()), alpha)
        scene = record.keyed(self._key, "sfumato camera", camera.encode())[: record.CODE_BYTES]
        series = os.urandom(8)

        def frame(image: Image) -> Release:
            release = session(image)
            told = session.bits
            draw = os.urandom(record.CODE_BYTES)
            entry = Entry(scene, draw, release.digest, session.alpha, 0, lambda _: told, series)
            self.ledger.enter([entry])
            return self._known(release)

        return frame

    def open(self, payload: object) -> bytes:
        """The bytes of a release this guard made. Raises GuardError for anything else."""
        made = self._made.get(id(payload))
        if type(payload) is not Release or made is None or made[0]() is not payload:
            raise GuardError(
                f"{type(payload).__name__} that this guard did not make",
                wanted="a release as guard(record, alpha) returns it",
                do="give the record to the guard, and what it returns to the client",
            )
        data = payload.to_bytes()
        if hashlib.sha256(data).digest() != made[1]:
            raise GuardError(
                "a release that was changed after it was made", wanted="what the guard returned, unchanged"
            )
        return data

    @property
    def _epoch(self) -> int:
        return self.protected.noise.epoch if isinstance(self.protected.noise, Keyed) else 0

    def _series(self, sites: tuple[int, int]) -> bytes:
        """What is counted together: one way from record to signal, under one tenant's noise or fresh noise."""
        noise = self.protected.noise
        whose = noise.name if isinstance(noise, Keyed) else b"fresh"
        return record.keyed(self._key, "sfumato series", self.protected.way(sites).encode(), whose)[:8]

    def _draw(self, one: Image, alpha: float, sites: tuple[int, int]) -> bytes:
        noise = self.protected.noise
        if isinstance(noise, Keyed):
            return noise.of(one, self.protected.digest, alpha, self.protected.way(sites)).draw
        return os.urandom(record.CODE_BYTES)

    def _composed(self, alpha: float, sites: int, releases: int) -> float:
        """Bits of K releases of one record: under keyed noise of near-duplicates, which share some of it."""
        shared = SHARED if isinstance(self.protected.noise, Keyed) else 0.0
        worth = releases / (1 + (releases - 1) * shared)
        with torch.inference_mode():
            return float(self.protected.obfuscator.bits_per_record(alpha, sites, releases=worth))

    def _known(self, release: Release) -> Release:
        place = id(release)
        known = weakref.ref(release, lambda _: self._made.pop(place, None))
        self._made[place] = (known, hashlib.sha256(release.to_bytes()).digest())
        return release
