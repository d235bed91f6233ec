"""The text behind a metric: where it comes from, its second moments, and where these are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npt.block.families import refuse_mixture
from npt.block.probing import linear_shape
from npt.common.display import one_line
from npt.common.places import place
from npt.data.sampling import sample_blocks
from npt.editing import probes
from npt.editing.statistics import (
    Moments,
    digest_of,
    moments_kept,
    moments_of,
    own_text,
    token_rows,
)
from npt.errors import NPTError
from npt.tuner.converted import base_of

METRICS = ("domain", "text", "identity")
#: Weight of the second moment of prompts like the edits' beside that of text, in the domain metric.
DOMAIN_WEIGHT = 4.0
#: Tokens in which statistics and prefixes begin; they name the random streams.
_SEED = 0


class Source:
    """Text that edits must not disturb.

    Args:
        model, tokenizer, metric, statistics, domain, cache_dir, progress: as `EditStore` takes them.

    Raises:
        NPTError: an unknown metric. DataError: text that is none. ConversionError: a mixture of experts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        metric: str,
        statistics: str | Sequence[str],
        domain: Sequence[str] | None,
        cache_dir: str | Path | None,
        progress: bool,
    ):
        if metric not in METRICS:
            raise NPTError(f"metric={metric!r} is unknown; use {', '.join(METRICS)}")
        if isinstance(statistics, str) and statistics != "self":
            raise NPTError(f"statistics={one_line(repr(statistics), 60)}: use 'self', or a list of texts")
        if isinstance(domain, str):
            raise NPTError(
                f"domain={one_line(repr(domain), 60)}: use a list of texts, or None for those of the package"
            )
        refuse_mixture(
            base_of(model), "edits are written into one down projection of a block, and it has one for each expert"
        )
        self.model, self.tokenizer, self.metric = model, tokenizer, metric
        self.cache_dir = None if cache_dir is None else place(cache_dir)
        self.progress = progress
        self._known: Moments = {}
        self._prefixes: dict[tuple[int, int], list[str]] = {}
        own = statistics == "self"
        self._given = None if own else token_rows(tokenizer, list(statistics), "statistics")
        near = None if metric != "domain" else probes.texts() if domain is None else list(domain)
        self._domain = None if near is None else token_rows(tokenizer, near, "domain")
        parts = [metric, "self" if self._given is None else digest_of(self._given)]
        if self._domain is not None:
            parts.append(f"domain {'own' if domain is None else digest_of(self._domain)}")
        #: Says what the metric is made of, without any work.
        self.name = " ".join(parts) if metric != "identity" else metric

    @torch.inference_mode(False)  # gradients are taken beside them later
    def moments(self, downs: Mapping[int, nn.Module]) -> Moments:
        """{block: its second moment (f, f), float64}: known, from the folder that keeps them, or from one pass over the text.

        There is none for the metric "identity".
        """
        if self.metric == "identity":
            return {}
        rows = self.text(max(linear_shape(down)[0] for down in downs.values()))
        missing = {block: down for block, down in downs.items() if block not in self._known}
        if missing:
            name = f"{self.metric} {digest_of([*rows, *(self._domain or [])])}"
            self._known |= moments_kept(
                self.model, missing, name, self.cache_dir, lambda downs: self._taken(downs, rows)
            )
        return {block: self._known[block] for block in downs}

    def _taken(self, downs: Mapping[int, nn.Module], rows: Sequence[Sequence[int]]) -> Moments:
        base = base_of(self.model)
        found = moments_of(base, downs, rows, progress=self.progress)
        if self._domain is None:
            return found
        near = moments_of(base, downs, self._domain, progress=self.progress)
        return {block: moment + DOMAIN_WEIGHT * near[block] for block, moment in found.items()}

    def only(self, layers: Sequence[int]) -> None:
        """Forgets the moments of all other blocks."""
        self._known = {block: moment for block, moment in self._known.items() if block in layers}

    def text(self, width: int) -> list[list[int]]:
        """Token ids of the text: what was given, or what the base writes. It has to be alone.

        Args:
            width: numbers of a key, which decides how much the base writes.
        """
        if self._given is None:
            self._given = own_text(self.model, self.tokenizer, width, self.cache_dir, _SEED)
        return self._given

    def prefixes(self, count: int, tokens: int) -> list[str]:
        """Short texts that the base writes, to put in front of a prompt; written once."""
        if (count, tokens) not in self._prefixes:
            found = sample_blocks(
                self.model, self.tokenizer, count, tokens + 1, seed=_SEED, label="prefixes", progress=False
            )
            texts = [self.tokenizer.decode(row[1:], skip_special_tokens=True).strip() for row in found["input_ids"]]
            self._prefixes[count, tokens] = [f"{' '.join(text.split())}. " for text in texts if text]
        return self._prefixes[count, tokens]
