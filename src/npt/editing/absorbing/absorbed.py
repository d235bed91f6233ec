"""One absorbed context: what was asked, how it was solved for, and what came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from npt.editing.absorbing.dialogue import Context, Conversation, shown
from npt.editing.absorbing.settings import Setting
from npt.editing.writing import Edit


@dataclass(frozen=True)
class Compared:
    """One question to the model without the context, with it, and after absorbing it.

    before, taught, after: what each writes. kl_before, kl_after: mean KL from the model with the context, over its answer's
    tokens, in nats. tokens: of that answer.
    """

    question: str
    before: str
    taught: str
    after: str
    kl_before: float
    kl_after: float
    tokens: int


@dataclass(frozen=True)
class Figures:
    """Means over questions that neither solved for the weight deltas nor chose their setting.

    kl_before, kl_after: over the answers' tokens, in nats. text_kl: from the base on text that it writes itself and that no
    setting was chosen by, in nats a token, with all contexts of the store at work. seconds: that absorbing took.
    """

    kl_before: float
    kl_after: float
    text_kl: float
    seconds: float

    @property
    def recovered(self) -> float:
        """The share of the context's effect that the weights took over, 1 at most."""
        return 1 - self.kl_after / self.kl_before if self.kl_before > 0 else 0.0


@dataclass(frozen=True)
class Absorbed(Edit):
    """A context that was absorbed.

    Of an `Edit`'s fields, `request.prompt` is the context, `layers` the patched blocks, `passes` the settings that were
    tried, `before` and `after` the answers to the first reported question, `holds` True where at least half of the context's
    effect is recovered.

    context: as it was given. setting: its own, which other contexts do not change. learnt: conversations that are solved for.
    reported: those that figures are of. compared: what came out of them when it was absorbed. left_out: questions that were
    left out, each with the reason. style: how questions are put. new_tokens: the longest answer.
    """

    context: Context = ""
    setting: Setting = field(default=Setting((), 1.0, 0.01, 1))
    learnt: tuple[Conversation, ...] = ()
    reported: tuple[Conversation, ...] = ()
    compared: tuple[Compared, ...] = ()
    figures: Figures = field(default=Figures(0.0, 0.0, 0.0, 0.0))
    left_out: tuple[str, ...] = ()
    style: str = "chat"
    new_tokens: int = 48


def id_of(context: Context, questions: Sequence[str] | None, answers: Sequence[str] | None) -> str:
    """Eight hexadecimal digits that belong to these words."""
    words = json.dumps([shown(context), list(questions or ()), list(answers or ())])
    return hashlib.sha256(words.encode("utf-8", "replace")).hexdigest()[:8]
