"""The command line: the only place that parses arguments. Each verb imports what it needs, so `--help` is instant."""

from statex.cli.main import main
from statex.cli.verbs import app

__all__ = ["app", "main"]
