"""The law of the mean KL: the cost of converting blocks together, from that of each block alone (docs/law.md).

Block i alone, converted, changes the logits of a token by delta_i. To second order the KL of several blocks together is half
the variance, over the original's next-token distribution p, of the sum of their delta_i:

    KL(S) = sum over i, j in S of G_ij,    G_ij = 1/2 E[Cov_p(delta_i, delta_j)]

G is measured on a little text, one forward pass per block, of that block and those after it. Its diagonal is the KL of each
block alone, exactly; the rest is the covariance over tokens that p draws.

In half precision every pass rounds in its own way, and the original's rounding is in all delta_i: of n blocks it would count
n^2 times. A pass with the exact value in block i's place differs from the original in rounding alone, by epsilon_i. What the
original's rounding adds to delta_i is taken off with the epsilon_i, and the KL of that pass from the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import comb
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from npt.block.families import blocks_of
from npt.block.layer import NPTLayer
from npt.block.modes import Mode, running_as
from npt.block.outputs import first_tensor
from npt.common.precision import HALF
from npt.common.processes import is_first
from npt.common.progress import tracked
from npt.data.batches import with_mask
from npt.errors import NPTError
from npt.tuner.converted import (
    ConvertedModel,
    active_layers,
    adapter_config,
    base_of,
    device_of,
    eval_mode,
    hidden_dtype,
)

#: Blocks of text that G is measured on: between these, so many that measuring takes no longer than calibrating.
LEAST_TEXTS, MOST_TEXTS = 8, 32
#: Tokens drawn from p at each position, for the covariance of two blocks.
DRAWS = 64
#: Most sets of blocks that are compared one by one.
TRIED = 20_000


@dataclass
class Interactions:
    """G of some blocks, text by text.

    Args:
        blocks: indices, ascending.
        gram: (texts, n, n), sums over the scored tokens of a text of G's summands, in nats.
        tokens: (texts,) scored tokens of a text.
        rounding: (texts, n), the sums of the KL that rounding alone makes, from each block on; None for none, as in float32.
    """

    blocks: list[int]
    gram: Tensor
    tokens: Tensor
    rounding: Tensor | None = None

    def predict(self, blocks: Collection[int] | None = None) -> tuple[float, float]:
        """Returns the mean KL, in nats a token, that converting these blocks will cost (all for None), and its standard error
        over texts, each of which is one draw.
        """
        at = [i for i, block in enumerate(self.blocks) if blocks is None or block in blocks]
        sums = self.gram[:, at][:, :, at].sum((1, 2))
        if at and self.rounding is not None:  # a measured KL has it too, from the lowest block on
            sums = sums + self.rounding[:, at[0]]
        mean, count = sums.sum() / self.tokens.sum(), len(sums)
        spread = (sums - mean * self.tokens).square().sum().sqrt() / self.tokens.sum()
        error = spread * (count / (count - 1)) ** 0.5 if count > 1 else torch.tensor(torch.nan)
        return float(mean.clamp_min(0)), float(error)

    def alone(self) -> dict[int, float]:
        """Returns {block: mean KL, in nats, of converting it alone}, without rounding's."""
        each = (self.gram.diagonal(dim1=1, dim2=2).sum(0) / self.tokens.sum()).clamp_min(0)
        return {block: float(kl) for block, kl in zip(self.blocks, each, strict=True)}

    def choose(self, count: int) -> list[int]:
        """Returns the `count` blocks, ascending, whose predicted KL together is least.

        Up to `TRIED` sets are compared one by one. Of more, the costliest block is left out again and again, and blocks are
        then exchanged as long as that helps.
        """
        total = self.gram.sum(0)
        rounding = torch.zeros(len(total)) if self.rounding is None else self.rounding.sum(0)

        def cost(chosen: Sequence[int]) -> float:
            at = list(chosen)
            return float(total[at][:, at].sum() + rounding[min(at)])

        kept = list(range(len(self.blocks)))
        if comb(len(kept), count) <= TRIED:
            return [self.blocks[i] for i in min(combinations(kept, count), key=cost)]
        while len(kept) > count:
            kept.remove(min(kept, key=lambda i: cost([j for j in kept if j != i])))
        while True:
            others = [i for i in range(len(self.blocks)) if i not in kept]
            swaps = [[new if i == old else i for i in kept] for old in kept for new in others]
            best = min(swaps, key=cost, default=kept)
            if not cost(best) < cost(kept):
                return sorted(self.blocks[i] for i in kept)
            kept = best


def probe_texts(blocks: int, texts: int) -> int:
    """Returns how many of so many texts G is measured on, where each of a model's blocks takes half a forward pass of it.

    At most half of them, and at least one. blocks: of the model, converted or not, so that separate jobs hold back the same.
    """
    wanted = max(LEAST_TEXTS, min(MOST_TEXTS, 2 * texts // (blocks + 2)))
    return max(1, min(wanted, texts // 2))


def passes_alone(model: ConvertedModel) -> int:
    """Returns how many passes with one block alone G takes: one for each block, two in half precision."""
    return len(active_layers(model)) * (2 if hidden_dtype(model) in HALF else 1)


@torch.no_grad()
def measure_interactions(
    model: ConvertedModel, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = False
) -> Interactions:
    """Measures G of the active adapter's blocks: per text one pass of the original, and one with each block alone converted.

    In half precision another one with each block's exact value follows, for what rounding does alone.

    The text is added to the adapter's record of what it was made with.

    Args:
        batches: of {"input_ids" (batch, tokens), "attention_mask" (the same; optional)}: a little text of the kind to predict.
        progress: shows a bar.

    Raises:
        NPTError: no text with two tokens.
    """
    layers, device = active_layers(model), device_of(model)
    texts = [{"input_ids": ids[mask.bool()][None].to(device)} for ids, mask in _rows(batches)]
    texts = [text for text in texts if text["input_ids"].shape[1] > 1]
    if not texts:
        raise NPTError("no text of two tokens or more to measure the blocks on: pass more text")
    if (record := adapter_config(model).text_record) is not None:
        for text in texts:
            record.add_batch(with_mask(text))
    generator = torch.Generator(device).manual_seed(0)
    found = []
    with eval_mode(model):
        for text in tracked(texts, "Measuring blocks", progress and is_first(), unit="texts"):
            found.append(_of_text(model, layers, text, generator))
    own, mixed, exact, alone, rounding = (torch.stack(parts) for parts in zip(*found, strict=True))
    drawn = own.sum(0).diagonal().clamp_min(1e-300)
    scale = (alone.sum(0) / drawn).sqrt()
    different = ~torch.eye(len(scale), dtype=torch.bool, device=own.device)
    slope = _slope(mixed[:, different], exact[:, different])
    covariances = torch.where(different, own - slope * (mixed + mixed.mT) + slope**2 * exact, own)
    gram = covariances * scale[:, None] * scale - slope * rounding.diag_embed()
    lengths = torch.tensor([text["input_ids"].shape[1] - 1 for text in texts], dtype=torch.float64)
    return Interactions(
        [layer.index for layer in layers], gram.cpu(), lengths, rounding.cpu() if rounding.any() else None
    )


def _slope(mixed: Tensor, exact: Tensor) -> float:
    """The slope of delta_i on epsilon_j over pairs of different blocks, which have the original's rounding alone in common.

    About 1, and 1 where there is no such pair: delta_i - slope epsilon_i is without it.

    Args:
        mixed: (texts, pairs), covariances of delta_i with epsilon_j. exact: of epsilon_i with epsilon_j.
    """
    common = float(exact.sum())
    return float(mixed.sum()) / common if common > 0 else 1.0


def _rows(batches: Iterable[Mapping[str, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    for batch in batches:
        whole: Any = with_mask(batch)
        yield from zip(whole["input_ids"], whole["attention_mask"], strict=True)


def _of_text(
    model: ConvertedModel, layers: Sequence[NPTLayer], text: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Half the covariances (n, n) of the delta_i, of delta_i with epsilon_j and of the epsilon_i, and the KL (n,) of both.

    Summed over the text's positions, in float64. epsilon_i is what block i's exact value changes, 0 but in half precision.
    """
    blocks, outputs = list(blocks_of(base_of(model))), list[Any]()
    thread = get_ident()

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if get_ident() == thread:  # of other threads nothing is kept, and nothing is given to them
            outputs.append(output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        with running_as(layers, Mode.ORIGINAL):
            logits = _logits(model, text)
    finally:
        for hook in hooks:
            hook.remove()
    # A model may give its logits in float32 all the same.
    halved = any(x.dtype in HALF for x in (logits, first_tensor(outputs[0])))
    original = logits.float().log_softmax(-1)
    drawn = torch.multinomial(original.exp(), DRAWS, replacement=True, generator=generator)

    def changes(mode: Mode | None) -> tuple[Tensor, Tensor]:
        """The changes by each block alone at the drawn tokens (n, positions, draws), centred, and the KL (n,)."""
        found, alone = [], []
        for layer in layers:
            others = [other for other in layers if other is not layer]
            with ExitStack() as stack:
                stack.enter_context(running_as(others, Mode.ORIGINAL))
                if mode is not None:
                    stack.enter_context(running_as([layer], mode))
                stack.enter_context(_giving(blocks[: layer.index], outputs))
                change = original - _logits(model, text).float().log_softmax(-1)
            alone.append((original.exp() * change).sum(dtype=torch.float64))
            drawn_change = change.gather(-1, drawn).double()
            found.append(drawn_change - drawn_change.mean(-1, keepdim=True))
        return torch.stack(found), torch.stack(alone).clamp_min(0)

    own, alone = changes(None)
    exact, rounding = changes(Mode.EXACT) if halved else (torch.zeros_like(own), torch.zeros_like(alone))
    pairs = ((own, own), (own, exact), (exact, exact))
    covariances = (torch.einsum("itk,jtk->ij", one, other) / (2 * (DRAWS - 1)) for one, other in pairs)
    return *covariances, alone, rounding


@contextmanager
def _giving(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """The first blocks of a model give the outputs that they gave before, instead of computing them again."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, output in zip(blocks, outputs, strict=False):
            block.forward = partial(_given, get_ident(), output, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward  # an attribute of the module, in the way of its class's
            if forward is not None:
                block.forward = forward


def _given(thread: int, output: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The output, in that thread; in others what the block computes."""
    return output if get_ident() == thread else forward(*args, **kwargs)


def _logits(model: ConvertedModel, text: dict[str, Tensor]) -> Tensor:
    """(positions, vocabulary) of the next token, but for the last position."""
    logits: Tensor = model(**text, use_cache=False).logits[0, :-1]
    return logits
