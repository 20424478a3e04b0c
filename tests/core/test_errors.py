"""The tree drawn in the module is the tree there is, and a message says got, wanted, do."""

import inspect
import re

import pytest

from sfumato.core import errors
from sfumato.core.errors import AlphaError, ArtefactError, RequestError, SfumatoError

CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
REQUESTS = [kind for kind in CLASSES.values() if issubclass(kind, RequestError)]


def drawn() -> dict[str, str | None]:
    """Name -> parent, read off the drawing: the deeper a name stands, the further down it is."""
    tree: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^\s*([\s│├└─]*)(\w+Error)\s+\S", line)
        if found:
            depth = line.index(found.group(2))
            above = [(d, name) for d, name in above if d < depth]
            tree[found.group(2)] = above[-1][1] if above else None
            above.append((depth, found.group(2)))
    return tree


def test_the_drawing_is_the_tree() -> None:
    real = {name: kind.__bases__[0].__name__ for name, kind in CLASSES.items()}
    assert drawn() == {**real, "SfumatoError": None}


def test_all_is_sorted_and_complete() -> None:
    assert errors.__all__ == sorted(CLASSES)


def test_everything_is_caught_as_sfumato_error() -> None:
    assert all(issubclass(kind, SfumatoError) for kind in CLASSES.values())
    assert not issubclass(SfumatoError, OSError | ValueError)


def test_exit_codes() -> None:
    assert SfumatoError.exit_code == 1 and {kind.exit_code for kind in REQUESTS} == {2}


@pytest.mark.parametrize("kind", REQUESTS)
def test_messages(kind: type[RequestError]) -> None:
    full = kind("a cat", wanted="a dog", do="adopt one")
    assert str(full) == "a cat\n  wanted: a dog\n  do: adopt one"
    assert (full.got, full.wanted, full.do) == ("a cat", "a dog", "adopt one")
    assert str(kind("a cat")) == "a cat" and str(kind("a cat", do="feed it")) == "a cat\n  do: feed it"


def test_wanted_and_do_are_named() -> None:
    with pytest.raises(TypeError):
        AlphaError("1.5", "below 1")  # type: ignore[call-arg]


def test_every_class_says_what_it_is_for() -> None:
    assert all((kind.__doc__ or "").strip().endswith(".") or kind is SfumatoError for kind in CLASSES.values())
    assert ArtefactError.__doc__ != RequestError.__doc__
