"""Documents say only what is so: links resolve, fenced commands exist with their options, fenced code parses.

Exits 1 and prints `file:line: what is wrong` for every finding. Checks, for each Markdown file of the repository:
relative links and their anchors; `sfumato VERB --option` against `sfumato VERB --help`; `make TARGET` against the
Makefile; `python3 PATH` against the tree; Python fences against the parser and `sfumato.NAME` in them against the
package's card; and that the words the project does not claim stand only where they are denied.
"""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"build", "demo", "dist", "out"}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"#{1,6}\s+(.+)")
NOT_CLAIMED = re.compile(r"anonym|irreversib", re.IGNORECASE)
DENIED = re.compile(r"\b(not|never|no|nor|neither|without)\b", re.IGNORECASE)


class Fence(NamedTuple):
    """A fenced block: its language, the line of its first content, the content."""

    language: str
    line: int
    text: str


def documents(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.md")):
        parts = path.relative_to(root).parts
        if not SKIPPED.intersection(parts) and not any(part.startswith(".") for part in parts):
            yield path


def parse(text: str) -> tuple[list[Fence], list[tuple[int, str]]]:
    """Markdown -> its fences and its lines outside of them, numbered from 1."""
    fences: list[Fence] = []
    prose: list[tuple[int, str]] = []
    block: list[str] = []
    language: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            if language is None:
                language, block = line.strip().strip("`").strip(), []
            else:
                fences.append(Fence(language, number - len(block), "\n".join(block)))
                language = None
        elif language is None:
            prose.append((number, line))
        else:
            block.append(line)
    return fences, prose


def anchors(path: Path) -> set[str]:
    """Heading -> anchor as GitHub derives it."""
    titles = [match[1] for _, line in parse(path.read_text())[1] if (match := HEADING.match(line))]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def check_links(path: Path, prose: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in prose:
        for match in LINK.finditer(re.sub(r"`[^`]*`", "", line)):
            target, _, anchor = (match[1] or match[2]).partition("#")
            if ":" in target:
                continue
            file = (path.parent / target).resolve() if target else path
            if not file.exists():
                yield number, f"link to {target}, which does not exist"
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                yield number, f"link to {target}#{anchor}: no such heading"


def check_words(prose: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in prose:
        if NOT_CLAIMED.search(line) and not DENIED.search(line):
            yield number, "a word this project does not claim, in a line that does not deny it"


def commands(fence: Fence) -> Iterator[tuple[int, list[str]]]:
    """Shell lines of a fence, continuation lines joined, prompt, comments and environment removed."""
    joined, first = "", 0
    for offset, line in enumerate(fence.text.splitlines()):
        joined, first = (joined + line, first) if joined else (line, offset)
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        words = shlex.split(joined.strip().removeprefix("$ "), comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            yield fence.line + first, words
        joined = ""


@cache
def help_of(*verb: str) -> str | None:
    """What `sfumato VERB --help` prints; None where it fails."""
    run = "from sfumato.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", run, *verb, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"},
        check=False,
    )
    return done.stdout if done.returncode == 0 else None


def check_sfumato(words: list[str]) -> Iterator[str]:
    verb = words[1:2] if len(words) > 1 and not words[1].startswith("-") else []
    shown = help_of(*verb)
    while shown is not None and "COMMAND [ARGS]" in shown and not [*words, "-"][len(verb) + 1].startswith("-"):
        verb = words[1 : len(verb) + 2]  # a verb of verbs, such as `sfumato export triton`
        shown = help_of(*verb)
    if shown is None:
        yield f"`{' '.join(['sfumato', *verb])}`: no such verb"
        return
    for option in (word.partition("=")[0] for word in words[1:] if word.startswith("-") and not is_number(word)):
        if option != "--help" and not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown):
            yield f"`sfumato {' '.join(verb)}` has no {option}"


def is_number(word: str) -> bool:
    return re.fullmatch(r"-?[\d.]+", word) is not None


def check_command(words: list[str]) -> Iterator[str]:
    name = Path(words[0]).name
    if name == "sfumato":
        yield from check_sfumato(words)
    elif name == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for word in words[1:]:
            if "=" not in word and word not in targets:
                yield f"`make {word}`: no such target"
    elif name in {"python", "python3"}:
        scripts = [word for word in words[1:2] if word.endswith(".py")]
        yield from (f"`{script}` does not exist" for script in scripts if not (ROOT / script).exists())


def check_python(fence: Fence) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(fence.text)
    except SyntaxError as error:
        yield fence.line + (error.lineno or 1) - 1, f"Python that does not parse: {error.msg}"
        return
    card = importlib.import_module("sfumato")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sfumato":
            home = ROOT / "src/sfumato" / node.attr
            if node.attr not in card.__all__ and not home.is_dir() and not home.with_suffix(".py").exists():
                yield fence.line + node.lineno - 1, f"sfumato.{node.attr} does not exist"


def check_fence(fence: Fence) -> Iterator[tuple[int, str]]:
    if fence.language == "python":
        yield from check_python(fence)
    elif fence.language in {"sh", "bash", "shell", "console"}:
        for line, words in commands(fence):
            if fence.language != "console" or fence.text.splitlines()[line - fence.line].startswith("$ "):
                yield from ((line, found) for found in check_command(words))


def check(path: Path) -> Iterator[tuple[int, str]]:
    fences, prose = parse(path.read_text())
    yield from check_links(path, prose)
    yield from check_words(prose)
    for fence in fences:
        yield from check_fence(fence)


def main() -> int:
    paths = list(documents(ROOT))
    findings = [f"{path.relative_to(ROOT)}:{line}: {what}" for path in paths for line, what in check(path)]
    print("\n".join([*findings, f"{len(paths)} documents, {len(findings)} findings"]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
