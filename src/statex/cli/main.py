"""The command: runs a verb, and turns what went wrong into an exit status."""

import errno
import sys
from typing import NoReturn

from statex.cli.app import app
from statex.cli.output import complain, no_space
from statex.errors import UserError

INTERRUPTED = 130
"""The status that typer exits with on an interrupt from the keyboard."""


def main() -> NoReturn:
    """Entry point: runs a verb and turns errors into exit status 1 (failure) or 2 (the user's mistake)."""
    from statex.run.launch import is_main_process, stop_signals

    status = 0
    try:
        try:
            with stop_signals():
                app(prog_name="statex")
        except SystemExit as end:
            if end.code == INTERRUPTED:
                raise KeyboardInterrupt from None
            raise
    except KeyboardInterrupt:
        if is_main_process():
            complain("stopped; the same command resumes")
        status = 1
    except UserError as error:
        complain(error)
        status = 2
    except OSError as error:
        complain(no_space(error) if error.errno == errno.ENOSPC else error)
        status = 1
    except FloatingPointError as error:
        complain(error)
        status = 1
    sys.exit(status)
