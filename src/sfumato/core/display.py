"""Small tables for notebooks, in HTML that needs no style sheet and no script; objects show them by `_repr_html_`."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, title: str = "") -> str:
    """A table with a head; every cell is escaped, so names that come with data cannot bring markup."""
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    above = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f"{_titled(title)}<table>{above}<tbody>{body}</tbody></table>"


def facts(title: str, named: Mapping[str, object]) -> str:
    """A name and a value a row."""
    return table((), named.items(), title=title)


def _titled(text: str) -> str:
    return f"<p><b>{escape(text)}</b></p>" if text else ""
