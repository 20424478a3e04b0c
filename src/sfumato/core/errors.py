"""Every error sfumato raises on purpose, drawn as a tree; each carries the exit code the command line ends with.

SfumatoError                 1  the work failed
├── ServerError              1  an inference server that is down, slow, busy, refuses or answers wrongly
└── RequestError             2  the request was wrong: got / wanted / what to type
    ├── AlphaError              alpha outside [0, 1)
    ├── ArtefactError           not an artefact, another version, another model, damaged
    ├── ClusterError            a cluster, or an object in it, that is not there or is refused
    ├── CutError                the model cannot be cut there
    ├── DatasetError            a dataset that is absent or incomplete
    ├── DeviceError             a device this machine does not have
    ├── GuardError              what is about to leave is no release of this guard's
    ├── ImageError              not an image, or one out of bounds
    ├── LedgerError             a ledger that cannot be used
    │   └── PolicyError         a release past the ledger's policy
    ├── OutputError             the output place cannot be written
    ├── ReleaseError            bytes that are not a release of this obfuscator
    ├── TenantKeyError          a tenant key that is not there, not private or no key
    └── WeightsError            weights that do not fit the model
"""

import linecache
import os

__all__ = [
    "AlphaError",
    "ArtefactError",
    "ClusterError",
    "CutError",
    "DatasetError",
    "DeviceError",
    "GuardError",
    "ImageError",
    "LedgerError",
    "OutputError",
    "PolicyError",
    "ReleaseError",
    "RequestError",
    "ServerError",
    "SfumatoError",
    "TenantKeyError",
    "WeightsError",
]


class SfumatoError(Exception):
    """The work failed. Never shows the content of a record."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a page of frames: the line that called sfumato, and the message."""
        return [*self._called(), f"{type(self).__name__}: {self}"]

    def _called(self) -> list[str]:
        package, frame, line = os.path.dirname(os.path.dirname(__file__)), self.__traceback__, ""
        while frame is not None and not frame.tb_frame.f_code.co_filename.startswith(package):
            number = frame.tb_lineno
            line = linecache.getline(frame.tb_frame.f_code.co_filename, number).strip()
            frame = frame.tb_next
        return [f"line {number}: {line}"] if line else []


class ServerError(SfumatoError):
    """An inference server failed us; `status` says how: down, slow, busy, refused or wrong."""

    def __init__(self, message: str, *, status: str) -> None:
        super().__init__(message)
        self.status = status


class RequestError(SfumatoError):
    """The request was wrong. The message says what was got, what was wanted and what to type."""

    exit_code = 2

    def __init__(self, got: str, *, wanted: str = "", do: str = "") -> None:
        self.got, self.wanted, self.do = got, wanted, do
        parts = [got, wanted and f"wanted: {wanted}", do and f"do: {do}"]
        super().__init__("\n  ".join(part for part in parts if part))


class AlphaError(RequestError):
    """Alpha outside [0, 1)."""


class ArtefactError(RequestError):
    """A file that is not an artefact, is damaged, of another version, or belongs to another model."""


class ClusterError(RequestError):
    """A Kubernetes cluster, or an object in it, that is not there, cannot be, or is refused."""


class CutError(RequestError):
    """The model cannot be cut at the place asked for."""


class DatasetError(RequestError):
    """A dataset that is absent or incomplete."""


class DeviceError(RequestError):
    """A device this machine does not have."""


class GuardError(RequestError):
    """What is about to leave is not a release that this guard made and entered."""


class ImageError(RequestError):
    """A file that is not an image, or an image out of bounds."""


class LedgerError(RequestError):
    """A ledger that cannot be used. Nothing was entered, so nothing may leave."""


class PolicyError(LedgerError):
    """A release that the ledger's policy refuses. Nothing was entered, so nothing may leave."""


class OutputError(RequestError):
    """A place that cannot be written."""


class ReleaseError(RequestError):
    """Bytes that are not a release, or a release of another obfuscator."""


class TenantKeyError(RequestError):
    """A tenant key that is not there, that others can read or replace, or that is no key. Never shows any of it."""


class WeightsError(RequestError):
    """Weights that do not fit the model."""
