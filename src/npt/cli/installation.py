"""Commands about the installation."""

from __future__ import annotations

from npt.cli.app import app, load, say
from npt.cli.options import Config, Set
from npt.common.distribution import DISTRIBUTION
from npt.errors import NPTError


@app.command()
def check(config: Config = None, set_: Set = None) -> None:
    """Checks the installation on a small random model.

    Converts it and tests what the conversion promises.
    """
    load(config, set_)
    from npt.selfcheck import run_checks

    failed = 0
    for name, problem in run_checks():
        say(f"{'ok  ' if problem is None else 'FAIL'}  {name}{'' if problem is None else ': ' + problem}")
        failed += problem is not None
    if failed:
        raise NPTError(
            f"{failed} check(s) failed; reinstall with: pip install --force-reinstall {DISTRIBUTION}, or in a clone "
            "pip install -c constraints.txt -e ."
        )
