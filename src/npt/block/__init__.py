"""One NPT block: its equation, the hooks that apply it, and where each model family keeps the modules they sit on."""

# First: npt.tuner, which peft's import brings (npt/__init__.py), needs the modules of this package whole.
import peft  # noqa: F401
