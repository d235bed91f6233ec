"""Second moments of `down`'s input over text: what an edit must not disturb.

A text counts from its first token on. The key there is the attention sink: huge, and the same for every text. A weight delta
that is not told about it disturbs every text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from npt.block.probing import linear_shape
from npt.common.files import replace_file
from npt.common.fingerprint import base_fingerprint
from npt.common.precision import wide
from npt.common.progress import progress_bar
from npt.data.sampling import sample_blocks
from npt.editing.replay import ending_at
from npt.errors import DataError
from npt.tuner.converted import device_of, eval_mode, run_backbone

#: Tokens of a piece of text.
LENGTH = 128
#: Tokens of the model's own text per number of a key; the most tokens of any text.
TOKENS_PER_NUMBER, MOST_TOKENS = 8, 2**17
_ROWS = 16
#: To be raised whenever the same arguments would give other moments.
_FORMAT = 1

Moments = dict[int, Tensor]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """input_ids (rows, tokens) of token ids, padded on the right, as the model takes them.

    No mask goes with them: a causal model's tokens never read what stands behind, and a padding token that may read nothing
    at all becomes NaN in some attentions and spoils its row.
    """
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return {"input_ids": ids.to(device)}


def token_rows(tokenizer: Any, texts: Sequence[str], named: str) -> list[list[int]]:
    """Token ids of texts from their first token on, as a prompt has them; long ones in pieces of `LENGTH` tokens.

    Raises:
        DataError: a text is no text, or there is none with a token.
    """
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f"{named}: text {number} is {type(text).__name__}; give a list of texts")
    rows: list[list[int]] = []
    tokens = 0
    for text in texts:
        ids = list(tokenizer(text, verbose=False)["input_ids"])[: MOST_TOKENS - tokens]
        tokens += len(ids)
        rows += [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    if not rows:
        raise DataError(f"{named}: no text has a token; give text of the kind that the model is for, or 'self'")
    return rows


def own_text(model: Any, tokenizer: Any, width: int, cache_dir: Path | None, seed: int = 0) -> list[list[int]]:
    """Token ids of text that the base writes itself, from BOS on; as prompts have it, without BOS where they have none.

    Args:
        width: numbers of a key, which decides how much text there is.
    """
    tokens = min(MOST_TOKENS, TOKENS_PER_NUMBER * width)
    found = sample_blocks(
        model, tokenizer, -(-tokens // LENGTH), LENGTH, seed=seed, cache_dir=cache_dir, label="statistics"
    )
    start = 0 if begins_with_bos(tokenizer) else 1
    return [list(row)[start:] for row in found["input_ids"]]


def begins_with_bos(tokenizer: Any) -> bool:
    """True for a tokenizer that puts BOS in front of a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


@torch.no_grad()
def moments_of(
    model: Any, downs: Mapping[int, nn.Module], rows: Sequence[Sequence[int]], *, progress: bool = True
) -> Moments:
    """E[i i^T] (f, f) in float64 of the input i of some blocks' `down`, over all tokens of the rows, in one pass.

    Args:
        downs: {block: its projection}.

    Raises:
        DataError: an input is not finite.
    """
    sums: Moments = {}
    seen: dict[int, Tensor] = {}
    handles = [_keep_input(down, seen, block) for block, down in downs.items()]
    tokens = 0
    try:
        with eval_mode(model), progress_bar("Statistics of text", len(rows), progress, unit="texts") as advance:
            for start in range(0, len(rows), _ROWS):
                part = rows[start : start + _ROWS]
                batch = padded(part, device_of(model))
                with ending_at(model, downs[max(downs)]):  # the blocks above and the head are not needed
                    run_backbone(model, batch)
                lengths = torch.tensor([len(row) for row in part])
                real = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).flatten()
                for block, x in seen.items():
                    inputs = wide(x.reshape(-1, x.shape[-1])[real.to(x.device)])
                    found = (inputs.T @ inputs).cpu().double()
                    sums[block] = sums[block] + found if block in sums else found
                tokens += int(real.sum())
                advance(len(part))
    finally:
        for handle in handles:
            handle.remove()
    for block, total in sums.items():
        if not bool(total.isfinite().all()):
            raise DataError(f"statistics: the input of block {block}'s down projection is not finite; use float32")
    return {block: total / tokens for block, total in sums.items()}


def _keep_input(down: nn.Module, seen: dict[int, Tensor], block: int) -> Any:
    return down.register_forward_pre_hook(lambda module, args: seen.__setitem__(block, args[0]))


def digest_of(rows: Sequence[Sequence[int]]) -> str:
    """Names the text that moments are of."""
    return hashlib.sha256(json.dumps([_FORMAT, [list(map(int, row)) for row in rows]]).encode()).hexdigest()[:32]


def moments_kept(
    model: Any,
    downs: Mapping[int, nn.Module],
    text: str,
    cache_dir: Path | None,
    take: Callable[[Mapping[int, nn.Module]], Moments],
) -> Moments:
    """Moments from the folder that keeps them, or taken now and kept there: float64 of the float32 that a file holds.

    Args:
        downs: {block: its projection}. text: names the text. take: makes the moments of some of the blocks.
    """
    files: dict[int, Path | None] = dict.fromkeys(downs)
    if cache_dir is not None:
        base = base_fingerprint(model)
        files = {block: _kept_moment(cache_dir, base, text, block) for block in downs}
    kept = {block: _read_moment(files[block], linear_shape(down)[0]) for block, down in downs.items()}
    found = {block: moment for block, moment in kept.items() if moment is not None}
    missing = {block: down for block, down in downs.items() if block not in found}
    for block, moment in (take(missing) if missing else {}).items():
        _write_moment(files[block], moment)
        found[block] = moment.float().double()
    return found


def _kept_moment(cache_dir: Path, base: str, text: str, block: int) -> Path:
    """The file that keeps the moment of one block of a base, which its fingerprint names."""
    key = hashlib.sha256(json.dumps([base, text, block]).encode()).hexdigest()[:32]
    return cache_dir / f"moment-{key}.safetensors"


def _read_moment(path: Path | None, width: int) -> Tensor | None:
    """The moment in a file; None where there is none, or not the one that is asked for."""
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_tensor("moment").double()
    except (SafetensorError, OSError):
        return None
    return found if tuple(found.shape) == (width, width) and bool(found.isfinite().all()) else None


def _write_moment(path: Path | None, moment: Tensor) -> None:
    """Keeps a moment, in float32."""
    if path is not None:
        values = {"moment": moment.float().contiguous()}
        replace_file(path, lambda temporary: save_file(values, temporary), shared=True)
