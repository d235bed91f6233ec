"""One edit's keys and values, found on the base alone: they depend on no other edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from npt.common.memory import trim_heap
from npt.common.progress import tracked
from npt.editing.bench import Bench, chunks
from npt.editing.keys import Place
from npt.editing.metrics import Source
from npt.editing.requests import Request
from npt.editing.solve import Metric
from npt.editing.trial import Problem, Settings
from npt.editing.values import STRATEGIES, Found

#: Prefixes that keys are averaged over, and their tokens.
PREFIXES, PREFIX_TOKENS = 4, 8
#: Edits after which free memory goes back to the system; prompts of many lengths leave it in pieces.
_TRIMMED_EVERY = 4


@dataclass(frozen=True)
class Edit:
    """A fact that was written.

    id: its name in the store. request: the words of the person. layers: the blocks. values: the strategy. passes: forward
    passes from the lowest block on that its values took. before, after: the text behind the prompt, of the base and with every
    edit of that moment. holds: True where `after` begins with the target. note: a remark for a person, empty for most.
    """

    id: str
    request: Request
    layers: tuple[int, ...]
    values: str
    passes: int
    before: str
    after: str
    holds: bool
    note: str = ""


def note_on(request: Request) -> str:
    """The remark that belongs to a request."""
    if request.subject is not None:
        return ""
    return "no subject: the key is that of the prompt's last token, and other wordings will mostly not follow"


class Writer:
    """Finds the pairs of single edits.

    Args:
        source: of the metric. bench: the model at the block. values: the strategy. settings: its own.
    """

    def __init__(self, source: Source, bench: Bench, values: str, settings: Settings):
        self.source, self.bench, self.values, self.settings = source, bench, values, settings
        self._metrics: tuple[Metric, ...] = ()
        self._prefixes: list[str] | None = None
        self._found: dict[Request, Found] = {}

    def metrics(self) -> tuple[Metric, ...]:
        """M at each block; the statistics are taken when they are first asked for."""
        if not self._metrics:
            sites = self.bench.sites
            with self.bench.off():
                moments = self.source.moments({site.layer: site.down for site in sites})
            self._metrics = tuple(Metric(moments.get(site.layer)) for site in sites)
        return self._metrics

    def prefixes(self) -> list[str]:
        """Nothing, and short texts of the base, to put in front of a prompt."""
        if self._prefixes is None:
            with self.bench.off():  # they are the base's, whatever is written
                self._prefixes = ["", *self.source.prefixes(PREFIXES, PREFIX_TOKENS)]
        return self._prefixes

    def check(self, request: Request) -> None:
        """Checks a request against the tokenizer and the model's context.

        Raises:
            DataError: see `Prompts`.
        """
        self._places(request, [""])
        for prompt in request.prompts:
            self.bench.prompts.target(prompt, request.target, self.settings.terminator)
        for text in request.protect:
            self.bench.prompts.ids(text)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def all(self, requests: Sequence[Request], progress: bool) -> dict[str, Found]:
        """{id: pairs of each edit}; all are checked before the first is looked for, in a caller's inference mode too."""
        for request in requests:
            self.check(request)
        shown = tracked(requests, "Writing edits", progress and len(requests) > 1, unit="edits")
        return {request.id: self.alone(request) for request in shown}

    def alone(self, request: Request) -> Found:
        """One edit's pairs. They depend on no other edit, so they are found once."""
        if request not in self._found:
            self._found[request] = self._find(request)
            if len(self._found) % _TRIMMED_EVERY == 0:
                trim_heap()
        return self._found[request]

    def _find(self, request: Request) -> Found:
        prefixes = self.prefixes() if request.subject is not None else [""]
        keys = tuple(found.mean(1) for found in self.bench.keys(self._places(request, prefixes)))
        nothing = tuple(key.new_zeros(len(key), 0) for key in keys)
        contexts = tuple(self.prefixes()) if self.settings.contexts else ("",)
        bare = Problem(self.bench, request, self.settings, self.metrics(), keys, nothing, contexts)
        return STRATEGIES[self.values](replace(bare, fixed=self._fixed(bare)))

    def _places(self, request: Request, prefixes: Sequence[str]) -> list[Place]:
        """The places whose keys are averaged: prompt and paraphrases, each bare and behind every prefix."""
        prompts = self.bench.prompts
        named = [p for p in request.prompts if request.subject is None or request.subject in p]
        return [prompts.place(prompt, request.subject, prefix) for prompt in named for prefix in prefixes]

    def _fixed(self, problem: Problem) -> tuple[torch.Tensor, ...]:
        """Keys of the protected prompts, (f, m) of each block: of each text the token that the edit would move most."""
        texts = problem.request.protect
        if not texts:
            return problem.fixed
        edited, rows = problem.rows(), [self.bench.prompts.ids(text) for text in texts]
        keys: list[list[torch.Tensor]] = [[] for _ in edited]
        for part in chunks(rows):
            for row, inputs, found in zip(edited, self.bench.inside(part, whole=False).inputs, keys, strict=True):
                for i, ids in enumerate(part):
                    own = inputs[i, : len(ids)].cpu().double()
                    found.append(own[int((own @ row).abs().argmax())])
        return tuple(torch.stack(found, 1) for found in keys)
