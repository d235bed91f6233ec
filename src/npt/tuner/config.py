"""`NPTConfig`: which blocks become neuro-plastic, and how; PEFT saves it as adapter_config.json."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.config import PeftConfig

from npt.builtin import recorded_name, source_at_hand
from npt.common.display import one_line
from npt.common.distribution import DISTRIBUTION
from npt.common.fingerprint import is_record
from npt.common.options import ALLOWED, DEFAULTS, OPTIONS, PROJECTIONS, tied_targets_down
from npt.errors import ConversionError
from npt.tuner.card import write_model_card

if TYPE_CHECKING:
    from npt.data.seen import TextRecord


class Method(str, Enum):
    """Our name among PEFT's methods; an enum like theirs: transformers and TRL ask a config's `peft_type` for its `.value`,
    PEFT reads the method in a model's status off its `str`.
    """

    NPT = "NPT"


PEFT_TYPE = Method.NPT


#: The attribute of a decoder block that holds its NPTLayer. The prefix "npt_" stands in `NPTLayer.npt_components` alone:
#: PEFT and transformers put the adapter's name right after the word that begins with it.
LAYER_NAME = "neuroplastic"


#: Of an adapter's files. An adapter of an older format is read for ever (tests/fixtures/adapters).
FORMAT_VERSION = 2
#: The remedy for a newer format.
UPGRADE = (
    f"install the npt that wrote it, or a newer one: pip install -U {DISTRIBUTION}, or in a clone git pull && "
    "pip install -e ."
)


@dataclass
class NPTConfig(PeftConfig):
    """Which blocks become neuro-plastic, and how their weight delta is generated.

    Args:
        npt_layers: "upper_half" (n//2 ... n-1), "lower_half", "all", or indices (negatives from the end). "auto" and "auto:N"
            convert all blocks until `npt.calibrate` keeps half of them, or N: those that cost least KL together.
        rank: columns of A; 0 for no low-rank part.
        modulation_scale: s in s tanh(a A).
        key: "input" (least norm), "tied" (the low-rank part reads z through A) or "learned".
        carry: "none", "diagonal" or "exact" (no parameters: the oracle, reads h).
        gain: "none", "norm" (reads the attention output alone), "overlap" (also its agreement with the token's own
            normalised state), "state" (the norm's own formula, with 1 / rms(h) estimated from that state) or
            "denominator" (the same, reading the norm's denominator too: exact from the start, with carry "diagonal").
        gain_units: hidden units of gain "state"'s estimate of 1 / rms(h); 0 for a linear one, as in files of format 1.
        low_rank_at: "input" or "projection".
        target_projections: subset of gate, up, down; a name the family does not have is an error, except gate, which
            plain MLPs lack by nature.
        target_modules: filled in by npt with the converted blocks' names; leave it alone.
        base_shape: filled in by npt: [hidden size, intermediate size, number of blocks] of the base it was made for.
        base_fingerprint: filled in by npt: what else the base is recognised by (`npt.common.fingerprint.base_record`).
        allow_other_base: load it on another base of the same sizes all the same; it is never saved as true.
        format_version: of the adapter's files; `FORMAT_VERSION` is written.
    """

    npt_layers: str | list[int] = DEFAULTS.npt_layers
    rank: int = DEFAULTS.rank
    modulation_scale: float = DEFAULTS.modulation_scale
    key: str = DEFAULTS.key
    carry: str = DEFAULTS.carry
    gain: str = DEFAULTS.gain
    gain_units: int = DEFAULTS.gain_units
    low_rank_at: str = DEFAULTS.low_rank_at
    target_projections: list[str] = field(default_factory=lambda: list(DEFAULTS.target_projections))
    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    base_shape: list[int] | None = None
    base_fingerprint: dict[str, Any] | None = None
    allow_other_base: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Validates everything that can be without the model.

        Raises:
            ConversionError: names every wrong option, its value and what is allowed.
        """
        super().__post_init__()
        self._text_record: TextRecord | None = None
        self._was_loaded, self._vocabulary = False, 0
        #: Blocks that `npt.calibrate` still has to choose.
        self.undecided: int | None = None
        self.peft_type = PEFT_TYPE
        self.task_type = self.task_type or "CAUSAL_LM"  # type: ignore[has-type]
        name = self.base_model_name_or_path  # type: ignore[has-type]
        # PEFT hands the name to `from_pretrained`, which knows no builtin model.
        self.base_model_name_or_path = source_at_hand(name) if isinstance(name, str) else name
        problems = []
        if not isinstance(self.format_version, int) or self.format_version > FORMAT_VERSION:
            raise ConversionError(
                f"format_version={self.format_version!r}: the adapter was written by a newer npt, this one reads up to "
                f"{FORMAT_VERSION}; {UPGRADE}"
            )
        if self.format_version < 2:
            self.gain_units = 0  # which the file does not name
        if not (self.base_fingerprint is None or is_record(self.base_fingerprint)):
            problems.append(
                f"base_fingerprint={one_line(repr(self.base_fingerprint), 40)}: npt writes it itself; restore the adapter's "
                "file"
            )
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("rank", "gain_units"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                problems.append(f"{name}={value!r}: use a whole number from 0 up")
        unknown = [name for name in self.target_projections if name not in PROJECTIONS]
        if unknown or not self.target_projections:
            problems.append(f"target_projections={self.target_projections!r}: use some of {', '.join(PROJECTIONS)}")
        if tied_targets_down(self.key, self.target_projections, self.rank, self.carry):
            problems.append(
                "key='tied' with target_projections including 'down': A has as many rows as the hidden size, the down "
                "projection's input is wider; use target_projections=['gate', 'up'] or key='input'"
            )
        if problems:
            raise ConversionError("; ".join(problems))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json, and the model card beside it unless a person's own is there.

        The base is written as `npt.builtin.recorded_name` has it: a builtin model's place differs from machine to machine.
        """
        saved = copy.copy(self)
        saved.allow_other_base, saved.base_model_name_or_path = False, recorded_name(self.base_model_name_or_path)
        super(NPTConfig, saved).save_pretrained(save_directory, **kwargs)
        write_model_card(save_directory, self)
        if self._text_record is not None and self._text_record:
            self._text_record.write(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Reads adapter_config.json and, in a local folder, the record of the text that the adapter was made with."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if isinstance(config, NPTConfig):
            from npt.data.seen import TextRecord  # here, because it imports datasets

            config._text_record, config._was_loaded = TextRecord.read(folder), True
        return config

    @property
    def text_record(self) -> TextRecord | None:
        """The text that the adapter was made with and measured on, as far as npt's own calibration and trainer read it.

        None where the adapter was loaded without a record.
        """
        if self._text_record is None and not self._was_loaded:
            from npt.data.seen import TextRecord  # here, because it imports datasets

            self._text_record = TextRecord.of_vocabulary(self._vocabulary)
        return self._text_record

    @text_record.setter
    def text_record(self, record: TextRecord | None) -> None:
        self._text_record = record

    def begin_record(self, vocabulary: int) -> None:
        """Gives an adapter that was not loaded a record of its own: one configuration may be used for several models.

        Args:
            vocabulary: tokens that the model knows.
        """
        self._vocabulary = vocabulary
        if not self._was_loaded:
            self._text_record = None

    def component_options(self) -> dict[str, Any]:
        """The fields of `ComponentSpec` this config fixes."""
        options = {name: getattr(self, name) for name in OPTIONS}
        del options["npt_layers"]
        return {"projections": tuple(options.pop("target_projections")), **options}

    @classmethod
    def from_options(cls, source: Any) -> NPTConfig:
        """A new adapter's configuration from anything with the fields `OPTIONS`."""
        return cls(**copy.deepcopy({name: getattr(source, name) for name in OPTIONS}))
