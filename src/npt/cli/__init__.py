"""The `npt` command: parse, call, print. A file for each group of commands."""

from npt.cli.app import _setup
from npt.cli.entry import console_main, main

__all__ = ["_setup", "console_main", "main"]
