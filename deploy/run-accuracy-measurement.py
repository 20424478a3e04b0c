#!/usr/bin/env python3
"""TR-4928's accuracy job under its own name, with its own arguments; every option of `sfumato measure` works too.

    python3 run-accuracy-measurement.py --dataset D
    python3 run-accuracy-measurement.py --dataset D --alpha 0.8 --noisy

SFUMATO_ARTEFACTS and SFUMATO_WEIGHTS name artefacts and weights where the command line does not.
"""

import os
import sys

from sfumato.cli.app import app

FROM_ENVIRONMENT = {"--artefacts": "SFUMATO_ARTEFACTS", "--weights": "SFUMATO_WEIGHTS"}


def arguments(given: list[str]) -> list[str]:
    """What `sfumato` is to be called with."""
    named = {word.partition("=")[0] for word in given}
    wanted = {option: os.environ.get(name) for option, name in FROM_ENVIRONMENT.items() if option not in named}
    return ["measure", *given, *(word for option, value in wanted.items() if value for word in (option, value))]


if __name__ == "__main__":
    app(arguments(sys.argv[1:]), prog_name="sfumato")
