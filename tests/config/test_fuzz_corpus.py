"""Inputs that fuzzing found, or that once broke something, pass the fuzzers' own functions."""

from __future__ import annotations

import pytest

from fuzz import targets
from npt.errors import ConfigError, DataError
from tests.helpers import REPOSITORY

CORPUS = REPOSITORY / "fuzz" / "corpus"


@pytest.mark.parametrize("name", ["config", "data"])
def test_the_corpus_breaks_nothing(name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    assert len(files) >= 20
    for path in files:
        try:
            getattr(targets, name)(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path}: {error!r}") from error


@pytest.mark.parametrize(("name", "error"), [("config", ConfigError), ("data", DataError)])
def test_what_is_no_error_of_ours_would_be_seen(
    name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The targets let nothing through but one line of the right kind."""

    def fails(problem: Exception) -> object:
        def run(*args: object) -> object:
            raise problem

        return run

    function = {"config": "load_config", "data": "TextFiles"}[name]
    monkeypatch.setattr(targets, function, fails(error("one line")))
    getattr(targets, name)(b"x")
    for problem in (KeyError("x"), error("two\nlines")):
        monkeypatch.setattr(targets, function, fails(problem))
        with pytest.raises((KeyError, AssertionError)):
            getattr(targets, name)(b"x")
