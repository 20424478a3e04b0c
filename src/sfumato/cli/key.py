"""`sfumato key`: a new tenant key."""

from pathlib import Path
from typing import Annotated

import typer


def key(file: Annotated[Path, typer.Argument(help="A new file; one that is there is never replaced.")]) -> None:
    """Write a new tenant key, which makes the noise of a record repeat, to a file that only you can read."""
    from sfumato.trusted.keys import new_key_file

    new_key_file(file)
    typer.echo(f"{file}: a new tenant key, mode 600")
    typer.echo(
        "It decides the noise of your records: keep it secret, for whoever has it can test guesses at them, and back it"
        " up, for without it a record that left before leaves again with new noise."
    )
