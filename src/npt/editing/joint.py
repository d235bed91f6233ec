"""The joint solve of many facts: how far their keys give way and their values are shortened, and what is trained behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from npt.common.precision import cast
from npt.editing.bench import Bench, Site
from npt.editing.measure import automatic_ridge, mean_kl_of
from npt.editing.requests import Request
from npt.editing.solve import Factors, Pairs, joined, solve

logger = logging.getLogger(__name__)

#: Lengths of the projection's own output that values are shortened to, one after the other, and the least ridge beside them.
CAPS, CAPPED_RIDGE = (1.5, 1.0, 0.7, 0.5, 0.35, 0.25), 0.1


@dataclass(frozen=True)
class Joint:
    """How facts are solved for together. ridge: see `npt.editing.solve`. cap: no value is longer than so many lengths of the
    projection's own output at its key; None leaves them as they are. trained: {block: weight delta} that is at work instead of
    the solve's, see `npt.editing.refining`; empty without one.
    """

    ridge: float = 0.0
    cap: float | None = None
    trained: Mapping[int, Factors] = field(default_factory=dict, compare=False)


@torch.no_grad()
def shortened(site: Site, pairs: Pairs, cap: float | None) -> Pairs:
    """Pairs of a block whose values are no longer than `cap` lengths of the projection's output at their keys."""
    if cap is None:
        return pairs
    own = site.down.forward(cast(pairs.keys.T, site.adapter.dtype).to(site.adapter.device)).norm(dim=-1)
    lengths = pairs.values.norm(dim=0).clamp_min(1e-30)
    return replace(pairs, values=pairs.values * (cap * own.to(lengths) / lengths).clamp_max(1.0))


def together(bench: Bench, found: Mapping[str, Mapping[int, Pairs]], cap: float | None) -> dict[int, Pairs]:
    """{block: pairs of all facts}, of {id: {block: pairs}}, in the order of the ids; their values shortened."""
    ids = sorted(found)
    return {s.layer: shortened(s, joined([found[id][s.layer] for id in ids]), cap) for s in bench.sites}


def warn_above(limit: float, bench: Bench, rows: Sequence[Sequence[int]]) -> None:
    """Warns where facts that were trained together disturb text more than the limit that they were solved for within."""
    if (kl := mean_kl_of(bench, rows)) > limit:
        logger.warning(
            "limit=%g: trained together, the edits disturb text by %.3g nats; refine=0 leaves them as they were solved for",
            limit, kl,
        )  # fmt: skip


def choose(
    bench: Bench,
    found: Mapping[str, Mapping[int, Pairs]],
    requests: Mapping[str, Request],
    ridge: float | str,
    limit: float | None,
    rows: Callable[[], Sequence[Sequence[int]]],
) -> Joint:
    """How facts are solved for; leaves one of the weight deltas that were tried at work.

    Args:
        bench: the model at the edited blocks.
        found: {id: {block: keys and values}} of all facts.
        requests: {id: request} of the same facts.
        ridge: a number, or "auto".
        limit: the most that all facts together may disturb text, mean KL in nats a token; None for no limit.
        rows: token ids of that text, asked for where there is a limit.
    """
    asked = [requests[id] for id in sorted(requests)]
    least = automatic_ridge(bench, together(bench, found, None), asked) if ridge == "auto" else float(ridge)
    if limit is None:
        return Joint(least)
    more = max(least, CAPPED_RIDGE if ridge == "auto" and len(asked) > 1 else 0.0)
    tried = [Joint(least), *(Joint(more, cap) for cap in CAPS)]
    text, kl = rows(), float("inf")
    for joint in tried:
        bench.set({layer: solve(pairs, joint.ridge) for layer, pairs in together(bench, found, joint.cap).items()})
        kl = mean_kl_of(bench, text)
        if kl <= limit:
            return joint
    logger.warning(
        "limit=%g: with values of %g lengths the edits still disturb text by %.3g nats; write fewer facts into one store, or "
        "raise the limit", limit, CAPS[-1], kl,
    )  # fmt: skip
    return tried[-1]
