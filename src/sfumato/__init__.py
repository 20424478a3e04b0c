"""sfumato: cut a trained model, send a learned, bounded, noisy signal, run the rest anywhere, measure what still leaks.

    split = sfumato.split(model, at="layer1")                             # any nn.Module; prints a plan
    protected = sfumato.fit(split, images, task=task, out="fitted")       # label-free, resumable
    release = protected(frame, alpha=0.8)                                 # the single additional line

The names below are the whole card. They load on first use (PEP 562), so that `import sfumato` costs nothing, not even
torch. No public name is also a module's name: importing a submodule would otherwise replace the function by the module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.auditing.run import audit
    from sfumato.core.cut import split
    from sfumato.core.obfuscator import Obfuscator
    from sfumato.facade import fit, load
    from sfumato.measurement import measure
    from sfumato.trusted.client import AsyncClient, Client

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client", "Obfuscator", "__version__", "audit", "fit", "load", "measure", "split"]

_HOMES = {
    "AsyncClient": "sfumato.trusted.client",
    "Client": "sfumato.trusted.client",
    "Obfuscator": "sfumato.core.obfuscator",
    "audit": "sfumato.auditing.run",
    "fit": "sfumato.facade",
    "load": "sfumato.facade",
    "measure": "sfumato.measurement",
    "split": "sfumato.core.cut",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home, once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
