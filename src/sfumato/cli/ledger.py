"""`sfumato ledger`: what has left, of all records and of one."""

from pathlib import Path
from typing import Annotated

import typer


def ledger(
    where: Annotated[str, typer.Argument(help="The ledger: a path, or postgresql://USER@HOST/NAME.")],
    photograph: Annotated[Path | None, typer.Option(help="What has left of this one?")] = None,
    key: Annotated[str | None, typer.Option(help="The key of its guard: FILE, env:NAME or pkcs11:...")] = None,
) -> None:
    """Say how much has left, in releases and in bits; of a photograph where its key is given."""
    from sfumato.core.errors import RequestError
    from sfumato.datasets import images
    from sfumato.trusted import record
    from sfumato.trusted.keys import tenant_key
    from sfumato.trusted.ledger import Ledger

    if (photograph is None) != (key is None):
        raise RequestError("a photograph without the key, or a key without a photograph", wanted="both or neither")
    book = Ledger(where, create=False)
    try:
        if photograph is not None and key is not None:
            found = book.exposure(record.named(tenant_key(key), images.read(photograph)))
            typer.echo(f"this photograph, and near-duplicates of it: {found.releases} releases, {found.bits:,.0f} bits")
            if not found.releases:
                typer.echo("nothing of it under this key: was it this key that the guard had?")
        all_of_it = book.totals()
    finally:
        book.close()
    typer.echo(
        f"{all_of_it.records:,} records, {all_of_it.releases:,} releases;"
        f" the record with the most: {all_of_it.largest_bits:,.0f} bits"
    )
