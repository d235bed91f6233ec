"""The sections of a run configuration: every key with its type and default, and which combinations contradict each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from npt.builtin import MODELS, PREFIX, TEXTS
from npt.common.options import (
    DEFAULTS,
    Carry,
    Gain,
    Key,
    LowRankSite,
    Projection,
    Score,
    is_automatic,
    is_calibrated,
    tied_targets_down,
)
from npt.common.places import expanded
from npt.errors import NPTError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    """Text such as 1e-3 as the number it means: YAML 1.1 takes it for text."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _no_duplicates(value: Any) -> Any:
    if isinstance(value, list) and len(set(value)) != len(value):
        raise ValueError("names an entry twice; name each once")
    return value


def _layers(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Gives one message, where pydantic would give one for each form that the value does not have."""
    try:
        return validate(value)
    except ValidationError:
        remedy = "use upper_half, lower_half, all, auto, auto:N, or a list of block indices such as [2, 3, -1]"
        raise ValueError(remedy) from None


def _or_auto(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Lets `auto` stand in the place of a number."""
    if value == "auto":
        return value
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        raise ValueError("use auto or a number above 0")
    return validate(value)


def _known(names: Iterable[str]) -> Callable[[str], str]:
    """A check that a `builtin:` name is one of `names`; any other name is checked when it is loaded."""

    def check(name: str) -> str:
        if name.startswith(PREFIX) and name not in names:
            raise ValueError(f"no such name in the package; use {' or '.join(names)}")
        return name

    return check


def _writable(text: str) -> str:
    """Refuses what can't be written: a NUL, which no file's name may hold, and half a surrogate pair."""
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds a NUL or half a surrogate pair; take it out")
    return text


def _off(value: Any) -> Any:
    """The text no where YAML 1.1 reads a bare one as false."""
    return "no" if value is False else value


def _expanded(text: str) -> str:
    """The name with its home folder, as `npt.common.places` has it."""
    try:
        return expanded(text)
    except NPTError as error:
        raise ValueError(str(error).removeprefix(f"{text}: ")) from None


def _listed(value: Any) -> Any:
    """A list of one for a single name."""
    return [value] if isinstance(value, str) else value


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
#: The largest whole number that all libraries take.
MOST = 2**31 - 1
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_writable)]
#: A serializer of its own: pydantic's, of a float, warns of `auto`.
Rate = Annotated[Real, Field(gt=0), WrapValidator(_or_auto), PlainSerializer(lambda value: value)]
Projections = Annotated[list[Projection], Field(min_length=1), AfterValidator(_no_duplicates)]
Indices = Annotated[list[Annotated[int, Field(ge=-MOST, le=MOST)]], Field(min_length=1)]
Automatic = Annotated[str, StringConstraints(pattern=r"^auto:[1-9][0-9]{0,8}$")]
Layers = Annotated[
    Literal["upper_half", "lower_half", "all", "auto"] | Automatic | Indices,
    WrapValidator(_layers),
    AfterValidator(_no_duplicates),
]
#: The name of a file or folder, or one that may be either that or a name on a hub; `~` is expanded here, once for all parts.
Place = Annotated[Text, AfterValidator(_expanded)]
Files = Annotated[list[Place], BeforeValidator(_listed)]
TextName = Annotated[Place, AfterValidator(_known(TEXTS))]
TextNames = Annotated[list[TextName], BeforeValidator(_listed), AfterValidator(_no_duplicates)]
#: (the keys that contradict each other, what is wrong and what to do)
Conflict = tuple[tuple[str, ...], str]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, defer_build=True)

    def conflicts(self) -> Iterator[Conflict]:
        """Combinations of valid keys that contradict each other; the error names the first key."""
        yield from ()

    @model_validator(mode="after")
    def _consistent(self) -> Section:
        found = list(self.conflicts())
        if found:
            raise PydanticCustomError("conflict", "keys contradict each other", {"conflicts": found})
        return self


class ModelSection(Section):
    """The base model, and how which of its blocks become neuro-plastic."""

    base_model_name: Annotated[Place, AfterValidator(_known(MODELS))] = "builtin:tiny"
    npt_layers: Layers = DEFAULTS.npt_layers
    rank: Count = DEFAULTS.rank
    modulation_scale: Annotated[Real, Field(gt=0)] = DEFAULTS.modulation_scale
    key: Key = DEFAULTS.key
    carry: Carry = DEFAULTS.carry
    gain: Gain = DEFAULTS.gain
    gain_units: Count = DEFAULTS.gain_units
    low_rank_at: LowRankSite = DEFAULTS.low_rank_at
    target_projections: Projections = list(DEFAULTS.target_projections)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    allow_other_base: bool = False

    def conflicts(self) -> Iterator[Conflict]:
        """A tied key can't read the input of the down projection, see `tied_targets_down`."""
        if tied_targets_down(self.key, self.target_projections, self.rank, self.carry):
            text = '"tied" can\'t target down; set model.target_projections=[gate, up] or model.key=input'
            yield ("key", "target_projections"), text


class TrainingSection(Section):
    """How long to train and with which objective; `num_train_steps` null: `num_epochs`, 0: calibration only."""

    batch_size: Positive = 16
    gradient_accumulation_steps: Positive = 1
    learning_rate: Rate = "auto"  # type: ignore[assignment]
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    num_epochs: Annotated[Real, Field(gt=0)] = 1.0
    num_train_steps: Count | None = None
    warmup_steps: Count = 10
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Real, Field(gt=0)] = 1.0
    objective: Literal["auto", "local", "logits", "composite"] = "auto"
    regularizer: Literal["factors", "delta"] = "delta"
    equivalence_weight: Annotated[Real, Field(ge=0)] = 1.0
    regularization_weight: Annotated[Real, Field(ge=0)] = 0.0
    calibrate: bool = True
    gradient_checkpointing: bool = False
    teacher_top_k: Positive = 64
    logging_steps: Positive = 10
    prediction_logging_steps: Positive = 150
    eval_steps: Positive = 50
    save_steps: Positive = 50
    report_to: list[Text] = []
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def objectives(self) -> list[str]:
        """The objectives of a run in their order. `auto` is `logits`, or `local` and then `logits` without calibration."""
        return {"auto": ["logits"] if self.calibrate else ["local", "logits"]}.get(self.objective, [self.objective])


class DataSection(Section):
    """Text: `self` (the frozen model's own), `text` with data_files, a builtin name, or a hub id.

    A sample is a block of max_length. `text_column` is of text or of chats; of chats, `score` says which tokens' predictions
    count. `streaming` reads the text as it trains, all of it, whatever `num_train_samples` says,
    and shuffles `shuffle_window` documents at once. `eval_texts` (files or builtin names) are reported beside the held-out
    text. Blocks that repeat text that was trained on are left out of every evaluation, unless `score_seen_text`.
    """

    dataset_name: TextName = "self"
    dataset_config: Text | None = None
    data_files: Files | None = None
    calibration_files: Files | None = None
    eval_texts: TextNames = [f"{PREFIX}python-docs"]
    text_column: Text = "text"
    score: Score = "all"
    streaming: bool = False
    shuffle_window: Positive = 1000
    max_length: Annotated[int, Field(ge=2, le=MOST)] = 256
    num_train_samples: Annotated[int, Field(ge=2, le=MOST)] | None = 512
    num_eval_samples: Positive | None = 400
    num_calibration_samples: Positive = 384
    num_detail_samples: Positive = 32
    begin_with_bos: bool = False
    score_seen_text: bool = False

    def conflicts(self) -> Iterator[Conflict]:
        """Sources, files and streaming that do not go together, and text that would be both trained and evaluated on."""
        if self.streaming and (self.dataset_name == "self" or self.dataset_name.startswith(PREFIX)):
            text = "is for text from a hub or from files; set data.dataset_name, or take it out"
            yield ("streaming", "dataset_name"), text
        if self.dataset_name == "text" and not self.data_files:
            yield ("dataset_name", "data_files"), '"text" needs files; set data.data_files=[FILE, ...]'
        if self.data_files and self.dataset_name != "text":
            text = "is read with data.dataset_name=text only; set that, or take data.data_files out"
            yield ("data_files", "dataset_name"), text
        for name in ("num_train_samples", "num_eval_samples"):
            if self.dataset_name == "self" and getattr(self, name) is None:
                yield (name, "dataset_name"), "null has no end with data.dataset_name=self; use a whole number"
        for name in ("data_files", "calibration_files"):
            both = sorted(set(self.eval_texts) & set(getattr(self, name) or ()))
            if both and not self.score_seen_text:
                text = (
                    f"{', '.join(both)} would be evaluated on after training on it; take it out of one of the two, or set "
                    "data.score_seen_text=true"
                )
                yield ("eval_texts", name), text


class WandbSection(Section):
    """Weights & Biases; WANDB_MODE=offline works as usual."""

    enabled: bool = False
    project: Text = "npt"
    entity: Text | None = None
    tags: list[Text] = []


class OptimizationSection(Section):
    """Memory: see MEMORY_OPTIMIZATION.md; `fsdp` shards the base over the processes of a launch: docs/scaling.md."""

    use_cpu_offload: bool = False
    use_8bit: bool = False
    use_4bit: bool = False
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_off)] = "no"
    fsdp: bool = False

    def conflicts(self) -> Iterator[Conflict]:
        """Pairs of ways to keep the weights: bitsandbytes, offloading and FSDP each place them on their own."""
        pairs = [("use_8bit", "use_cpu_offload"), ("use_4bit", "use_cpu_offload"), ("use_4bit", "use_8bit")]
        for one, other in (*pairs, *(("fsdp", name) for name in ("use_8bit", "use_4bit", "use_cpu_offload"))):
            if getattr(self, one) and getattr(self, other):
                text = f"true can't be combined with optimization.{other}=true; set one of them to false"
                yield (one, other), text


class PathsSection(Section):
    """Folders. `cache_dir` null: the libraries' own caches, and sampled text is not kept. `teacher_cache` null: the original
    model runs in every training step.
    """

    output_dir: Place = "outputs"
    checkpoint_dir: Place = "checkpoints"
    cache_dir: Place | None = None
    teacher_cache: Place | None = None


class FinetuningSection(Section):
    """`npt finetune` (docs/finetuning.md): where it starts, what holds it to the original, what it is compared with."""

    adapter: Place | None = None
    anchor_weight: Annotated[Real, Field(ge=0)] = 0.0
    num_anchor_samples: Positive = 64
    compare: Annotated[list[Literal["lora", "dora"]], BeforeValidator(_listed), AfterValidator(_no_duplicates)] = []
    compare_learning_rates: list[Annotated[Real, Field(gt=0)]] = []

    def conflicts(self) -> Iterator[Conflict]:
        """A learning rate belongs to each method, or to none."""
        rates, methods = len(self.compare_learning_rates), len(self.compare)
        if rates not in (0, methods):
            text = f"names {rates} for {methods} methods; give one for each, or [] for training.learning_rate"
            yield ("compare_learning_rates", "compare"), text


class RunConfig(Section):
    """Everything a run needs."""

    model: ModelSection = Field(default_factory=ModelSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    data: DataSection = Field(default_factory=DataSection)
    wandb: WandbSection = Field(default_factory=WandbSection)
    optimization: OptimizationSection = Field(default_factory=OptimizationSection)
    paths: PathsSection = Field(default_factory=PathsSection)
    finetuning: FinetuningSection = Field(default_factory=FinetuningSection)

    def conflicts(self) -> Iterator[Conflict]:
        """A stream has no end to count steps from, and no fixed blocks to keep teacher targets for."""
        if self.data.streaming and self.training.num_train_steps is None:
            text = "has no end with data.streaming=true; set a number of steps"
            yield ("training.num_train_steps", "data.streaming"), text
        if self.data.streaming and self.paths.teacher_cache is not None:
            text = "is for a fixed set of blocks, which data.streaming=true has not; set one of them off"
            yield ("paths.teacher_cache", "data.streaming"), text
        if self.data.streaming and self.finetuning.anchor_weight:
            text = "goes with the blocks of a fixed text, which data.streaming=true has not; set one of them off"
            yield ("finetuning.anchor_weight", "data.streaming"), text
        for name in ("fsdp", "use_cpu_offload"):
            if self.finetuning.compare and getattr(self.optimization, name):
                text = f"other methods are trained whole in each process; set optimization.{name}=false, or compare nothing"
                yield ("finetuning.compare", f"optimization.{name}"), text
        if is_automatic(self.model.npt_layers):
            yield from self._conflicts_of_choice()

    def _conflicts_of_choice(self) -> Iterator[Conflict]:
        """Blocks are chosen by what their calibration leaves, in a model that is whole."""
        ask = "name the blocks, which `npt predict` chooses without this setting"
        if self.optimization.fsdp:
            yield ("model.npt_layers", "optimization.fsdp"), f"can't be chosen with optimization.fsdp=true; {ask}"
        if not self.training.calibrate:
            yield ("model.npt_layers", "training.calibrate"), f"can't be chosen with training.calibrate=false; {ask}"
        if not is_calibrated(self.model.carry, self.model.gain):
            text = "chooses by what each block costs, which is nothing with this model.carry and model.gain; name the blocks"
            yield ("model.npt_layers", "model.gain"), text


#: {name: class} of the sections.
SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "training": TrainingSection,
    "data": DataSection,
    "wandb": WandbSection,
    "optimization": OptimizationSection,
    "paths": PathsSection,
    "finetuning": FinetuningSection,
}


def known_keys() -> dict[str, type[Section]]:
    """{"section.key": section class} of every key."""
    return {f"{name}.{key}": section for name, section in SECTIONS.items() for key in section.model_fields}
