"""Entry point: read the settings, set up the log, and run a command or the server.

What each of them needs is imported for it alone: `plan` shall answer at once.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys

from modules import settings as settings_module
from modules.errors import SettingsError, TurntableError
from modules.settings import Settings


def set_up_logging(settings: Settings) -> None:
    """To stderr in short, to a file in the data folder in full; no conversation is ever logged."""
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    root = logging.getLogger("turntable")
    root.setLevel(settings.log_level.upper())
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
    file = logging.handlers.RotatingFileHandler(
        settings.data_dir / "turntable.log", maxBytes=2_000_000, backupCount=2, encoding="utf-8"
    )
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if settings.command in ("ask", "bench"):
        terminal.setLevel("ERROR")
    for handler in (terminal, file):
        root.addHandler(handler)


def run(settings: Settings) -> int:
    """The command of the settings; its exit code."""
    if settings.command in ("download", "models", "plan"):
        from modules import terminal

        return terminal.run(settings)
    from modules import commands

    return commands.run(settings)


def main(arguments: list[str]) -> int:
    """Entry point; errors a person can meet end in one sentence and exit code 2 or 1."""
    try:
        settings = settings_module.read(arguments)
        set_up_logging(settings)
        if settings.command != "serve":
            return run(settings)
        from modules.server import serve

        return serve(settings)
    except SettingsError as error:
        print(f"turntable: {error} {error.hint}".rstrip(), file=sys.stderr)
        return 2
    except TurntableError as error:
        print(f"turntable: {error} {error.hint}".rstrip(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"turntable: {error}. Look at the rights and the free space of the data folder.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
