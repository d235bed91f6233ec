"""Text that the frozen model writes itself: the `self` data source.

Plain ancestral sampling, x_i ~ p(. | x_<i) at temperature 1 with nothing cut off. `generate()` isn't used: it fills
what an argument leaves unset from the model's generation_config and draws from the global random state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from npt.common.files import replace_file
from npt.common.fingerprint import base_fingerprint
from npt.common.limits import check_ids, check_length, vocabulary_of
from npt.common.places import place
from npt.common.processes import first_does, share, total, world
from npt.common.progress import progress_bar
from npt.common.sharded import is_sharded
from npt.data.packing import IGNORED, as_blocks
from npt.errors import DataError

logger = logging.getLogger(__name__)

#: Tokens of the vocabulary whose probabilities are summed first.
DRAW_BLOCK = 256

# The default batch: at most this many blocks, and no more than keep keys, values and probabilities within this size.
_MAX_BATCH = 256
_BATCH_BYTES = 4 << 30

# To be raised whenever the same arguments would give other text, so that older cache files no longer match.
_FORMAT = 2


def sample_blocks(
    model: Any,
    tokenizer: Any,
    num_blocks: int,
    max_length: int,
    *,
    seed: int,
    batch_size: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    label: str = "",
) -> datasets.Dataset:
    """Blocks of text sampled from the base model, whatever its generation_config says and without its adapters.

    Every block starts with BOS (the tokenizer's BOS, else its EOS, else the model's BOS) and has exactly `max_length`
    tokens: as in packed pretraining text, sampling goes on after a separator. Labels are as for packed text: that a
    document ends is scored; what follows a separator inside a block is not (it is another document's first token);
    what follows the block's own BOS is. attention_mask is all ones.

    Several processes share the work and all get all blocks: all call it.

    The same arguments give the same blocks; the global random state is neither read nor changed. Another `batch_size`
    uses the same random numbers, so blocks differ only where rounding of the logits tips a draw; don't count on it.

    Args:
        model: a causal language model or a PEFT model around one; every module keeps its train or eval mode.
        tokenizer: the model's.
        num_blocks: blocks to sample.
        max_length: tokens in a block, BOS included.
        seed: chooses the random stream, with the label.
        label: give training and evaluation text different ones.
        batch_size: blocks sampled at once; None is 256, or less where that would take more than 4 GiB.
        cache_dir: keep blocks there (safetensors), found again by weights, configuration and all arguments.
        progress: show a progress bar.

    Returns:
        `num_blocks` rows of input_ids, attention_mask and labels, each `max_length` ints.

    Raises:
        DataError: a size out of range, `max_length` above the model's context, or no token to begin with.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_sizes(base.config, num_blocks, max_length, batch_size)
    bos = _first_token(tokenizer, base.config)
    batch_size = min(num_blocks, batch_size or default_batch(base, max_length))
    path = kept_blocks(model, tokenizer, num_blocks, max_length, seed, label, batch_size, cache_dir)
    ids = None if path is None else first_does(lambda: _read_cache(path, (num_blocks, max_length)))
    if ids is None:
        uniforms = _uniforms(num_blocks, max_length - 1, seed, label)
        name = f"Sampling {label} text" if label else "Sampling text"
        with _frozen(model), progress_bar(name, uniforms.numel(), progress, unit="tokens") as advance:
            ids = _sample(base, bos, uniforms, batch_size, advance)
        if path is not None:
            first_does(lambda: _write_cache(path, ids))
    separators = {bos, tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    return _with_labels(ids.numpy(), sorted(separators))


def kept_blocks(
    model: nn.Module,
    tokenizer: Any,
    num_blocks: int,
    max_length: int,
    seed: int,
    label: str,
    batch_size: int | None = None,
    cache_dir: str | Path | None = None,
) -> Path | None:
    """The file in which `sample_blocks` keeps the blocks of these arguments, written or not; None without a cache_dir."""
    if cache_dir is None:
        return None
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    batch_size = min(num_blocks, batch_size or default_batch(base, max_length))
    request = [num_blocks, max_length, seed, label, batch_size, _first_token(tokenizer, base.config)]
    key = json.dumps([_FORMAT, request, base_fingerprint(model)])
    return place(cache_dir) / f"self-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _check_sizes(config: Any, num_blocks: int, max_length: int, batch_size: int | None) -> None:
    sizes = {"num_blocks": (num_blocks, 1), "data.max_length": (max_length, 2), "batch_size": (batch_size, 1)}
    for name, (value, least) in sizes.items():
        if value is not None and value < least:
            raise DataError(f"{name}={value}: sampling text from the model needs at least {least}; raise it")
    check_length(config, max_length, "data.max_length")


def _first_token(tokenizer: Any, config: Any) -> int:
    config = config.get_text_config(decoder=True)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(config, "bos_token_id", None)):
        if token is not None:
            check_ids([token], vocabulary_of(config), "data.dataset_name=self", tokenizer)
            return int(token)
    raise DataError(
        "data.dataset_name=self: neither tokenizer nor model has a BOS or EOS token to begin text with; "
        "name one of its tokens as bos_token in its tokenizer_config.json (in Python, set tokenizer.bos_token), or use "
        "data.dataset_name=text with data.data_files"
    )


def default_batch(base: Any, max_length: int) -> int:
    config = base.config.get_text_config(decoder=True)
    keys_and_values = 2 * config.num_hidden_layers * config.hidden_size * max_length * base.dtype.itemsize
    probabilities = 3 * config.vocab_size * torch.float64.itemsize
    return max(1, min(_MAX_BATCH, _BATCH_BYTES // (keys_and_values + probabilities)))


def _uniforms(rows: int, columns: int, seed: int, label: str) -> torch.Tensor:
    """(rows, columns) float64 in [0, 1), on the CPU so that every device draws the same."""
    digest = hashlib.sha256(json.dumps([seed, label]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The base model alone, in eval mode, without autograd; every module's own mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    with contextlib.ExitStack() as stack:
        # What FSDP2 gathers in inference mode can't be used outside it.
        stack.enter_context(torch.no_grad() if is_sharded(model) else torch.inference_mode())
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _sample(
    base: Any, bos: int, uniforms: torch.Tensor, batch_size: int, advance: Callable[[int], None]
) -> torch.Tensor:
    """(blocks, 1 + draws) int32 ids; one draw for every number in `uniforms`. Processes share the batches."""
    blocks, draws = uniforms.shape
    ids = torch.zeros(blocks, draws + 1, dtype=torch.int32)
    for _, start, counts in share(range(0, blocks, batch_size), is_sharded(base)):
        chunk = uniforms[start : start + batch_size]
        tokens = torch.full((len(chunk), draws + 1), bos, device=base.device)
        cache = preallocated_cache(base, draws)
        for i in range(draws):
            logits = base(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            tokens[:, i + 1] = draw(logits, chunk[:, i])
            advance(len(chunk) * world()[1])
        if counts:
            ids[start : start + batch_size] = tokens.to("cpu", torch.int32)
    return total(ids)  # each row was filled by one process


@torch.inference_mode()
def seconds_per_draw(base: Any, rows: int, length: int) -> float:
    """Seconds in which the model writes one token in each of `rows` texts, on average over texts of `length` tokens.

    Timed on the first tokens and, where the cache can be filled up without writing them, on the last.
    """
    cache, tokens = preallocated_cache(base, length), torch.zeros(rows, 1, dtype=torch.long, device=base.device)
    uniforms, found = torch.full((rows,), 0.5, dtype=torch.float64), []

    def write(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            # On the CPU, and so complete.
            draw(base(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1], uniforms).cpu()
        return (time.perf_counter() - start) / count

    write(1)  # what libraries do at a first call
    found.append(write(min(2, length - 1)))
    if length > 8 and all(type(layer) is _PreallocatedLayer for layer in cache.layers):
        for layer in cache.layers:
            layer.skip(length - 4)
        found.append(write(2))
    return sum(found) / len(found)


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """(batch,) ids, one from each row of (batch, vocabulary) logits: the inverse of the distribution function.

    First a block of `DRAW_BLOCK` tokens, by the blocks' sums, then a token in it. Only those two sums are in float64, so that
    rare tokens of a large vocabulary are not lost; each token's probability is float32's, right to 1e-6 of itself.
    """
    wide = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
    wide = wide if wide.dtype == torch.float64 else wide.float()
    weights = (wide - wide.amax(-1, keepdim=True)).exp_()
    rows, vocabulary = weights.shape
    blocks = nn.functional.pad(weights, (0, -vocabulary % DRAW_BLOCK)).view(rows, -1, DRAW_BLOCK)
    sums = blocks.sum(-1).double().cumsum(-1)
    # Below one, also where a product rounds up, so that no token of weight zero is met at the end.
    target = uniforms.to(sums.device)[:, None].clamp_max(1 - 1e-15) * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_min(0)), 0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, DRAW_BLOCK))[:, 0].double().cumsum(-1)
    # As a share of the block, whose sum in float32 differs in the last digits.
    share_of_block = ((target - before) / (sums.gather(1, block) - before)).clamp(0, 1 - 1e-15)
    token = torch.searchsorted(inside, share_of_block * inside[:, -1:], right=True)
    return (block * DRAW_BLOCK + token)[:, 0].clamp_(max=vocabulary - 1)


class _PreallocatedLayer(DynamicLayer):
    """A cache layer for a known length: appending writes in place, where DynamicLayer copies all there is each step."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = [x.new_empty(*x.shape[:2], self.max_length, x.shape[3]) for x in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self._stores)
        return self.keys, self.values

    def skip(self, length: int) -> None:
        """Makes as if `length` tokens had been appended, their keys and values zero."""
        for store in self._stores:
            store[:, :, self.get_seq_length() : length] = 0
        self.keys, self.values = (store[:, :, :length] for store in self._stores)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._stores = [store[indices] for store in self._stores]
        self.keys, self.values = (store[:, :, : self.get_seq_length()] for store in self._stores)


def preallocated_cache(base: Any, length: int) -> DynamicCache:
    """A cache for `length` tokens that are appended one by one; for the model `base`."""
    cache = DynamicCache(config=base.config)
    # Sliding windows and recurrent layers keep a cache of their own kind.
    cache.layers = [_PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _with_labels(ids: np.ndarray, separators: list[int]) -> datasets.Dataset:
    labels = ids.copy()
    # From 2 on: the first token predicted, at 1, follows the block's own BOS and counts.
    labels[:, 2:][np.isin(ids[:, 1:-1], separators)] = IGNORED
    return as_blocks(ids, np.ones_like(ids), labels)


def _read_cache(path: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            ids: torch.Tensor = file.get_tensor("input_ids")
    except (SafetensorError, OSError) as error:
        logger.warning("%s: unreadable cache (%s); sampling the text again", path, error)
        return None
    if ids.dtype != torch.int32 or tuple(ids.shape) != shape:
        logger.warning("%s: cache of the wrong shape; sampling the text again", path)
        return None
    return ids


def _write_cache(path: Path, ids: torch.Tensor) -> None:
    """Writes a cache file whole; other runs may write the same one at the same time."""
    replace_file(path, lambda temporary: save_file({"input_ids": ids}, temporary), shared=True)
