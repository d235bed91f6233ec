"""Proofs of an edit: the text that follows, the logits from the lowest edited block on, the damage to other text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from npt.common.precision import wide
from npt.common.progress import tracked
from npt.editing.bench import Bench, chunks
from npt.editing.requests import Request
from npt.editing.solve import Pairs, solve
from npt.editing.statistics import token_rows

if TYPE_CHECKING:
    from npt.editing.writing import Edit

#: Ridges that `ridge="auto"` tries, largest first; the last one only keeps equal keys apart.
RIDGES = (0.3, 0.1, 0.03, 0.01, 1e-6)
#: Tokens that are written behind a prompt, beside those of its target.
SHOWN = 12


@dataclass(frozen=True)
class Preview:
    """Both models on one text.

    text: what was given. before, after: what the base and the edited model write behind it. kl: mean divergence of the edited
    model's next-token distributions from the base's over the text's tokens, in nats. logits: the edited model's,
    (tokens, vocabulary).
    """

    text: str
    before: str
    after: str
    kl: float
    logits: Tensor


@dataclass(frozen=True)
class Verification:
    """One edit, read back with all edits at work: the base's text, the edited model's, and whether the target follows."""

    id: str
    prompt: str
    target: str
    before: str
    after: str
    holds: bool


def follows(text: str, target: str) -> bool:
    """True where a generated text begins with the target, and no word goes on behind it."""
    text, target = text.lstrip(), target.strip()
    rest = text[len(target) :]
    return text.startswith(target) and not (rest[:1].isalnum() and target[-1:].isalnum())


@torch.no_grad()
def previewed(bench: Bench, text: str, new_tokens: int) -> Preview:
    """Both models on one text; the edited one runs from the lowest edited block on."""
    ids = bench.prompts.ids(text)
    inside = bench.inside([ids])
    logits = bench.again(inside.recording)[0]
    kl = float(divergences(inside.recording.whole[0], logits).mean())
    with bench.off():
        before = bench.write(text, new_tokens)
    return Preview(text, before, bench.write(text, new_tokens), kl, logits)


def divergences(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base || edited) in nats of logits (tokens, vocabulary), (tokens,): sums in float64 of terms in float32 or wider."""
    return apart(likelihoods(base), likelihoods(edited.to(base.device)))


def likelihoods(logits: Tensor) -> Tensor:
    """Log-likelihoods (tokens, vocabulary) in float32 or wider."""
    return wide(logits).log_softmax(-1)


def apart(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base || edited) in nats of log-likelihoods (tokens, vocabulary), (tokens,) in float64 on the CPU."""
    return (base.exp() * (base - edited)).sum(-1, dtype=torch.float64).clamp_min(0).cpu()


def mean_kl(bench: Bench, texts: Sequence[str]) -> float:
    """Mean divergence over all tokens of texts, in nats."""
    return mean_kl_of(bench, token_rows(bench.tokenizer, texts, "texts"))


@torch.no_grad()
def mean_kl_of(bench: Bench, rows: Sequence[Sequence[int]]) -> float:
    """The same of token ids."""
    total, tokens = 0.0, 0
    for part in chunks(rows, 8):
        recording = bench.inside(part).recording
        logits = bench.again(recording)
        for i, row in enumerate(part):
            total += float(divergences(recording.whole[i, : len(row)], logits[i, : len(row)]).sum())
            tokens += len(row)
    return total / tokens


def holding(bench: Bench, requests: Sequence[Request]) -> Callable[[], list[bool]]:
    """A function that says of every edit if the model would write its target now, each token of it the likeliest.

    Greedy text begins with the target exactly where every token of it is the likeliest one behind those before, and the next
    one does not go on with its last word; so one pass from the lowest edited block on stands for the generation.
    """
    rows = [bench.prompts.target(request.prompt, request.target, None) for request in requests]
    recorded = [(part, bench.inside([row.ids for row in part], whole=False).recording) for part in chunks(rows)]

    @torch.no_grad()
    def ask() -> list[bool]:
        right: list[bool] = []
        for part, recording in recorded:
            first = min(row.start for row in part) - 1
            asked = torch.arange(first, max(len(row.ids) for row in part))
            best = wide(bench.again(recording, asked)).argmax(-1).cpu()
            for i, row in enumerate(part):
                said = best[i, row.start - 1 - first : len(row.ids) - first].tolist()
                ends = not (row.in_word and bool(bench.prompts.continuing[said[-1]]))
                right.append(said[:-1] == list(row.targets) and ends)
        return right

    return ask


def largest_ridge(bench: Bench, pairs: Mapping[int, Pairs], requests: Sequence[Request]) -> float:
    """The largest ridge at which every edit holds; where none lets all hold, the one that lets most of them."""
    best, ask = (-1, 0.0), holding(bench, requests)
    for ridge in RIDGES:
        bench.set({layer: solve(own, ridge) for layer, own in pairs.items()})
        count = sum(ask())
        best = max(best, (count, ridge))
        if count == len(requests):
            break
    return best[1]


def automatic_ridge(bench: Bench, pairs: Mapping[int, Pairs], requests: Sequence[Request]) -> float:
    """The ridge that `ridge="auto"` takes: the largest at which all hold, none for a single edit without protected prompts."""
    if len(requests) > 1:
        return largest_ridge(bench, pairs, requests)
    return RIDGES[-1] if requests[0].protect else 0.0


def shown(bench: Bench, request: Request) -> int:
    """Tokens that are written behind a request's prompt to show the text before and after."""
    return SHOWN + len(bench.prompts.target(request.prompt, request.target, None).targets)


def readings(
    bench: Bench,
    requests: Sequence[Request],
    off: Callable[[], AbstractContextManager[None]],
    in_full: bool,
    progress: bool,
) -> Iterator[dict[str, Any]]:
    """The fields before, after and holds of new edits, in the requests' order.

    Args:
        bench: the model at the edited blocks, with the edits at work.
        requests: those that were written.
        off: leaves all edits out within a `with` block.
        in_full: False leaves both texts blank, and asks one pass whether an edit holds.
        progress: show a progress bar.
    """
    if not in_full:
        yield from ({"holds": holds} for holds in holding(bench, requests)())
        return
    for request in tracked(requests, "Reading back", progress and len(requests) > 1, unit="edits"):
        with off():
            before = bench.write(request.prompt, shown(bench, request))
        after = bench.write(request.prompt, shown(bench, request))
        yield {"before": before, "after": after, "holds": follows(after, request.target)}


def verified(bench: Bench, edits: Sequence[Edit], progress: bool) -> list[Verification]:
    """Every fact's text before and after, with all edits at work, and whether it holds.

    Args:
        bench: the model at the facts' blocks.
        edits: those that are read back.
        progress: show a progress bar.
    """
    found = []
    for edit in tracked(edits, "Verifying", progress and len(edits) > 8, unit="edits"):
        request = edit.request
        after = bench.write(request.prompt, shown(bench, request))
        held = follows(after, request.target)
        found.append(Verification(edit.id, request.prompt, request.target, edit.before, after, held))
    return found
