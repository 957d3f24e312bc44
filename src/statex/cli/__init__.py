"""The command line: the only place that parses arguments. Each verb imports what it needs, so `--help` is instant."""

from statex.cli.app import app
from statex.cli.main import main

__all__ = ["app", "main"]
