"""The package as pip knows it: its name there, how its extras are installed, the versions of what it works with."""

from npt import __version__

#: The name on package indexes, where `npt` is somebody else's project. Import name and command are `npt`.
DISTRIBUTION = "neuroplastic"
#: Distributions whose version may change what npt computes.
LIBRARIES = ("torch", "transformers", "peft")


def install_extra(extra: str) -> str:
    """The command that installs the optional dependencies `extra` of pyproject.toml."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def versions() -> dict[str, str]:
    """{"npt" and each of `LIBRARIES`: its version, or "not installed"}; imports none of them."""
    return {"npt": __version__, **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # `npt --help` has no use for it

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
