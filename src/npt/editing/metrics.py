"""The text behind a metric: where it comes from, its second moments, and where these are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from npt.block.probing import linear_shape
from npt.common.display import one_line
from npt.common.fingerprint import base_fingerprint
from npt.common.places import place
from npt.data.sampling import sample_blocks
from npt.editing import probes
from npt.editing.statistics import (
    Moments,
    digest_of,
    kept_moments,
    moments_of,
    own_text,
    read_moments,
    token_rows,
    write_moments,
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
        NPTError: an unknown metric. DataError: text that is none.
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
        self.model, self.tokenizer, self.metric = model, tokenizer, metric
        self.cache_dir = None if cache_dir is None else place(cache_dir)
        self.progress = progress
        own = metric != "identity" and statistics == "self"
        self._given = None if own or metric == "identity" else token_rows(tokenizer, list(statistics), "statistics")
        near = None if metric != "domain" else probes.texts() if domain is None else list(domain)
        self._domain = None if near is None else token_rows(tokenizer, near, "domain")
        parts = [metric, "self" if self._given is None else digest_of(self._given)]
        if self._domain is not None:
            parts.append(f"domain {'own' if domain is None else digest_of(self._domain)}")
        #: Says what the metric is made of, without any work.
        self.name = " ".join(parts) if metric != "identity" else metric

    def moment(self, layer: int, down: nn.Module) -> Tensor | None:
        """The second moment (f, f) at one block, float64; None for the metric "identity"."""
        return self.moments({layer: down}).get(layer)

    def moments(self, downs: Mapping[int, nn.Module]) -> Moments:
        """The second moments at several blocks, from one pass over the text or from the folder that keeps them."""
        if self.metric == "identity":
            return {}
        widths = {block: linear_shape(down)[0] for block, down in downs.items()}
        rows = self._given
        if rows is None:
            rows = own_text(self.model, self.tokenizer, max(widths.values()), self.cache_dir, _SEED)
        text = digest_of([*rows, *(self._domain or [])])
        kept = None
        if self.cache_dir is not None:
            kept = kept_moments(self.cache_dir, base_fingerprint(self.model), f"{self.metric} {text}", list(downs))
        if (found := read_moments(kept, widths)) is not None:
            return found
        base = base_of(self.model)
        found = moments_of(base, downs, rows, progress=self.progress)
        if self._domain is not None:
            near = moments_of(base, downs, self._domain, progress=self.progress)
            found = {block: moment + DOMAIN_WEIGHT * near[block] for block, moment in found.items()}
        write_moments(kept, found)
        return found

    def prefixes(self, count: int, tokens: int) -> list[str]:
        """Short texts that the base writes, to put in front of a prompt."""
        found = sample_blocks(
            self.model, self.tokenizer, count, tokens + 1, seed=_SEED, label="prefixes", progress=False
        )
        texts = [self.tokenizer.decode(row[1:], skip_special_tokens=True).strip() for row in found["input_ids"]]
        return [f"{' '.join(text.split())}. " for text in texts if text]
