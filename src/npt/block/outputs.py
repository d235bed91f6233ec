"""Outputs of modules: a tensor, or a tuple that begins with one; with batch and tokens, or flattened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def first_tensor(output: Any) -> Tensor:
    """A block's hidden states: its output, or the first entry of the tuple it returns."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def with_first(output: Any, change: Callable[[Tensor], Tensor | None]) -> Any:
    """A module's output with its hidden states changed: a tensor, or the first entry of a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def shaped(x: Tensor, like: Tensor) -> Tensor:
    """x with the leading dimensions of `like`."""
    return x.view(*like.shape[:-1], x.shape[-1])
