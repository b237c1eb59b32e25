"""The command line `maskmerge`.

Modules that a command needs are imported when it runs, so that `--help` and completion are quick.
"""

from app.cli.commands import main

__all__ = ["main"]
