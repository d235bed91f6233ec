"""Every causal language model type that the installed transformers knows, and how npt stands to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from npt.block.families import FAMILIES
from npt.block.refusals import REASONS, refusal
from npt.common.display import one_line
from npt.common.quiet import quiet_transformers


class State(str, Enum):
    """How npt stands to a model type."""

    CONVERTED = "converted"
    REFUSED = "refused"
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Standing:
    """A model type. reason: why it is not converted; where it is, blank, or the type that its models are saved as."""

    model_type: str
    state: State
    reason: str = ""


def standings() -> list[Standing]:
    """All types in alphabetical order, those that `register_family` added included.

    A type is judged by its default configuration: a dense model of a type that is refused as a mixture may well be converted.
    """
    with quiet_transformers():
        return [standing_of(one) for one in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILIES})]


def standing_of(model_type: str) -> Standing:
    """How npt stands to a type, known to transformers or not."""
    if model_type in FAMILIES:
        return Standing(model_type, State.CONVERTED)
    if model_type in REASONS:
        return Standing(model_type, State.REFUSED, REASONS[model_type])
    try:
        config: Any = AutoConfig.for_model(model_type)
        if config.model_type in FAMILIES:
            return Standing(model_type, State.CONVERTED, f"as {config.model_type}")
        if (inner := _text_inside(model_type, config)) in FAMILIES:
            return Standing(model_type, State.CONVERTED, f"as {inner}")
        reason = refusal(config) or refusal(config.get_text_config(decoder=True))
    except Exception as error:  # the code of a model that nobody has tried: whatever it does, the list goes on
        problem = one_line(str(error) or type(error).__name__, 60)
        return Standing(model_type, State.NOT_TRIED, f"its default configuration can't be made ({problem})")
    if reason is not None:
        return Standing(model_type, State.REFUSED, reason)
    return Standing(model_type, State.NOT_TRIED, "no line in the table of families; register_family adds one")


def _text_inside(model_type: str, config: Any) -> str | None:
    """The type of the text model that the causal LM of a composite type is; None where it is more than that."""
    text = config.get_text_config(decoder=True)
    if text is config or text.model_type not in FAMILIES:
        return None
    found: Any = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return str(text.model_type) if found.config_class is type(text) else None
