"""The command line: one module per verb, which parses, calls and prints."""

from __future__ import annotations

import logging
import os
import sys


def main() -> None:
    """Entry point of `medtpp`. Exit status 0, 1 where a part failed, 2 for a mistake of the user."""
    from medtpp.cli._app import app
    from medtpp.errors import MedtppError

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("medtpp").setLevel(logging.INFO)
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except MedtppError as error:
        if debug:
            raise
        from rich.console import Console

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("Error:", style="bold red", end=" ")
        console.print(str(error), markup=False)
        sys.exit(2)
    except OSError as error:
        if debug:
            raise
        sys.stderr.write(f"Error: {error.filename or 'The system says'}: {error.strerror or error}\n")
        sys.exit(2)
