"""The run configuration: typed YAML with dotted overrides, every problem reported at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from npt.builtin import MODELS, PREFIX, TEXTS
from npt.common.display import one_line
from npt.common.files import write_text
from npt.config.strict_yaml import MAX_BYTES, parse_yaml
from npt.errors import ConfigError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; a person means the number."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _no_duplicates(value: Any) -> Any:
    if isinstance(value, list) and len(set(value)) != len(value):
        raise ValueError("names an entry twice; name each once")
    return value


def _layers(value: Any, validate: Callable[[Any], Any]) -> Any:
    """One message instead of one for each form that the value does not have."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("use upper_half, lower_half, all, or a list of block indices such as [2, 3, -1]") from None


def _known(names: Iterable[str]) -> Callable[[str], str]:
    """A `builtin:` name has to be one of `names`; any other is checked when it is loaded."""

    def check(name: str) -> str:
        if name.startswith(PREFIX) and name not in names:
            raise ValueError(f"no such name in the package; use {' or '.join(names)}")
        return name

    return check


def _writable(text: str) -> str:
    """No system takes a NUL in a file's name, and half a surrogate pair can't be written at all."""
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds a NUL or half a surrogate pair; take it out")
    return text


def _listed(value: Any) -> Any:
    """One name need not be a list."""
    return [value] if isinstance(value, str) else value


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
#: What fits the libraries' and the machine's whole numbers.
MOST = 2**31 - 1
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_writable)]
Projections = Annotated[list[Literal["gate", "up", "down"]], Field(min_length=1), AfterValidator(_no_duplicates)]
Indices = Annotated[list[Annotated[int, Field(ge=-MOST, le=MOST)]], Field(min_length=1)]
Layers = Annotated[
    Literal["upper_half", "lower_half", "all"] | Indices, WrapValidator(_layers), AfterValidator(_no_duplicates)
]
Files = Annotated[list[Text], BeforeValidator(_listed)]
TextName = Annotated[Text, AfterValidator(_known(TEXTS))]
TextNames = Annotated[list[TextName], BeforeValidator(_listed), AfterValidator(_no_duplicates)]
#: (the keys that contradict each other, what is wrong and what to do)
Conflict = tuple[tuple[str, ...], str]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)

    def conflicts(self) -> Iterator[Conflict]:
        """What is right key by key and wrong together; the first key is the one to blame."""
        yield from ()

    @model_validator(mode="after")
    def _consistent(self) -> _Section:
        found = list(self.conflicts())
        if found:
            raise PydanticCustomError("conflict", "keys contradict each other", {"conflicts": found})
        return self


class ModelSection(_Section):
    """Which model, and which of its blocks become neuro-plastic, how."""

    base_model_name: Annotated[Text, AfterValidator(_known(MODELS))] = "builtin:tiny"
    npt_layers: Layers = "upper_half"
    rank: Count = 16
    modulation_scale: Annotated[Real, Field(gt=0)] = 1.0
    key: Literal["input", "tied", "learned"] = "input"
    carry: Literal["none", "diagonal", "exact"] = "diagonal"
    gain: Literal["none", "norm", "overlap", "state"] = "state"
    low_rank_at: Literal["input", "projection"] = "input"
    target_projections: Projections = ["gate", "up", "down"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    allow_other_base: bool = False

    def conflicts(self) -> Iterator[Conflict]:
        """A tied key reads the hidden state through A; the down projection's input is wider."""
        if self.key == "tied" and "down" in self.target_projections and self.rank and self.carry != "exact":
            text = '"tied" can\'t target down; set model.target_projections=[gate, up] or model.key=input'
            yield ("key", "target_projections"), text


class TrainingSection(_Section):
    """How long and towards what to train; `num_train_steps` null = epochs, 0 = calibration only."""

    batch_size: Positive = 16
    gradient_accumulation_steps: Positive = 1
    learning_rate: Annotated[Real, Field(gt=0)] = 1e-3
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
        """The objectives of a run, in their order: `auto` is `logits`, after `local` where nothing was calibrated."""
        return {"auto": ["logits"] if self.calibrate else ["local", "logits"]}.get(self.objective, [self.objective])


class DataSection(_Section):
    """Text: `self` (the frozen model's own), `text` with data_files, a builtin name, or a hub id.

    A sample is a block of max_length. `streaming` reads the text as it trains, all of it, whatever `num_train_samples` says,
    and shuffles `shuffle_window` documents at once. `eval_texts` (files or builtin names) are reported beside the held-out
    text.
    """

    dataset_name: TextName = "self"
    dataset_config: Text | None = None
    data_files: Files | None = None
    calibration_files: Files | None = None
    eval_texts: TextNames = [f"{PREFIX}python-docs"]
    text_column: Text = "text"
    streaming: bool = False
    shuffle_window: Positive = 1000
    max_length: Annotated[int, Field(ge=2, le=MOST)] = 256
    num_train_samples: Annotated[int, Field(ge=2, le=MOST)] | None = 1632
    num_eval_samples: Positive | None = 400
    num_calibration_samples: Positive = 384

    def conflicts(self) -> Iterator[Conflict]:
        """Text needs files, and the model's own text has no end of its own."""
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
            if both := sorted(set(self.eval_texts) & set(getattr(self, name) or ())):
                text = f"{', '.join(both)} would be evaluated on after training on it; take it out of one of the two"
                yield ("eval_texts", name), text


class WandbSection(_Section):
    """Weights & Biases; WANDB_MODE=offline works as usual."""

    enabled: bool = False
    project: Text = "npt"
    entity: Text | None = None
    tags: list[Text] = []


class OptimizationSection(_Section):
    """Memory: see MEMORY_OPTIMIZATION.md; `fsdp` shards the base over the processes of a launch: docs/scaling.md."""

    use_cpu_offload: bool = False
    use_8bit: bool = False
    use_4bit: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    fsdp: bool = False

    def conflicts(self) -> Iterator[Conflict]:
        """Quantised weights stay where bitsandbytes put them; sharded ones are FSDP's to move."""
        pairs = [("use_8bit", "use_cpu_offload"), ("use_4bit", "use_cpu_offload"), ("use_4bit", "use_8bit")]
        for one, other in (*pairs, *(("fsdp", name) for name in ("use_8bit", "use_4bit", "use_cpu_offload"))):
            if getattr(self, one) and getattr(self, other):
                text = f"true can't be combined with optimization.{other}=true; set one of them to false"
                yield (one, other), text


class PathsSection(_Section):
    """Where things go; `cache_dir` null = the libraries' own caches, and sampled text is not kept; `teacher_cache` null =
    the original model runs in every training step.
    """

    output_dir: Text = "outputs"
    checkpoint_dir: Text = "checkpoints"
    cache_dir: Text | None = None
    teacher_cache: Text | None = None


class RunConfig(_Section):
    """Everything a run needs."""

    model: ModelSection = Field(default_factory=ModelSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    data: DataSection = Field(default_factory=DataSection)
    wandb: WandbSection = Field(default_factory=WandbSection)
    optimization: OptimizationSection = Field(default_factory=OptimizationSection)
    paths: PathsSection = Field(default_factory=PathsSection)

    def conflicts(self) -> Iterator[Conflict]:
        """A stream has no end to count from, and no fixed blocks to keep something for."""
        if self.data.streaming and self.training.num_train_steps is None:
            text = "has no end with data.streaming=true; set a number of steps"
            yield ("training.num_train_steps", "data.streaming"), text
        if self.data.streaming and self.paths.teacher_cache is not None:
            text = "is for a fixed set of blocks, which data.streaming=true has not; set one of them off"
            yield ("paths.teacher_cache", "data.streaming"), text


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a YAML file (or the defaults) with "dotted.key=value" overrides, values in YAML.

    Raises:
        ConfigError: every problem in one message, each with its key, its value and what to do.
    """
    values: dict[str, Any] = {} if path is None else _read(Path(path))
    problems = []
    for override in overrides:
        problem = _override(values, override)
        if problem:
            problems.append(problem)
    problems += [_unknown(key) for key in islice(_unknown_keys(values), 100)]
    config, found = _validate(values)
    problems += found
    if problems or config is None:
        raise ConfigError(f"{'configuration' if path is None else path}: {_together(problems)}")
    return config


def _together(problems: Iterable[str]) -> str:
    """One line of all problems; past the first 20 they are counted."""
    lines = list(dict.fromkeys(one_line(problem) for problem in problems))
    return "; ".join([*lines[:20], *([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])])


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes a configuration as YAML, every key."""
    write_text(Path(path), yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))


def with_overrides(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A copy with {"section.key": value} changed.

    Raises:
        ConfigError: what comes out contradicts itself.
    """
    values = config.model_dump()
    for name, value in changes.items():
        section, key = name.split(".")
        values[section][key] = value
    changed, problems = _validate(values)
    if changed is None or problems:
        raise ConfigError(_together(problems))
    return changed


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"--config {path}: more than {MAX_BYTES:,} bytes; that is no configuration, name another")
        values = parse_yaml(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path}: no such file; name a YAML file, e.g. config.yaml") from error
    except IsADirectoryError as error:
        raise ConfigError(f"--config {path}: is a folder; name a YAML file in it, e.g. config.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = one_line(error, 300)
        raise ConfigError(f"--config {path}: not readable as YAML: {reason}; mend the file or name another") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: expected sections like `model:`, found {type(values).__name__}; write section: and its "
            "keys indented below"
        )
    # A section whose keys are all commented out is null.
    return {name: {} if name in RunConfig.model_fields and value is None else value for name, value in values.items()}


def _override(values: dict[str, Any], override: str) -> str | None:
    """Applies one override; returns what is wrong with it, if anything."""
    dotted, separator, text = (part.strip() for part in override.partition("="))
    parts = dotted.split(".")
    shown = f"--set {one_line(override, 200)}"
    if not separator or not all(parts):
        return f"{shown}: write section.key=value, e.g. training.num_train_steps=100"
    if dotted in RunConfig.model_fields:
        return f"{shown}: {dotted} is a section; write {dotted}.key=value"
    if len(parts) != 2:
        return f"{shown}: {_unknown(dotted)}"
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        return f"{shown}: the value is not YAML ({one_line(error, 80)}); quote it"
    section = values.setdefault(parts[0], {})
    if isinstance(section, dict):
        section[parts[1]] = value
    return None


def option_problems(options: Mapping[str, Any]) -> list[str]:
    """What is wrong with values of the `model` section, as an adapter's file holds them."""
    return [problem.removeprefix("model.") for problem in _validate({"model": dict(options)})[1]]


def known_keys() -> dict[str, type[BaseModel]]:
    """{"section.key": section class} of every key."""
    sections = {name: field.default_factory for name, field in RunConfig.model_fields.items()}
    return {f"{name}.{key}": section for name, section in sections.items() for key in section.model_fields}  # type: ignore


def _unknown_keys(values: dict[str, Any]) -> Iterator[str]:
    known = known_keys()
    for name, section in values.items():
        if name not in RunConfig.model_fields:
            yield name
        elif isinstance(section, dict):
            yield from (f"{name}.{key}" for key in section if f"{name}.{key}" not in known)


def _unknown(key: str) -> str:
    """What to write instead: the nearest key of any section, one of the same section before its like elsewhere."""
    section, _, leaf = key.rpartition(".")

    def likeness(name: str) -> float:
        its_section, _, its_leaf = name.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, its_leaf).ratio() + 0.1 * (section == its_section)

    names = [*known_keys(), *(() if section else RunConfig.model_fields)]
    nearest = max(names, key=likeness)
    if likeness(nearest) >= 0.7:
        return f"{key}: unknown key; did you mean {nearest}?"
    return f"{key}: unknown key; remove it (the sections are {', '.join(RunConfig.model_fields)})"


def _validate(values: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """(the configuration or None, every problem but unknown keys).

    A wrong value hides the checks across keys of its section, so it is taken out and the rest checked again.
    """
    values = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    config, first = _attempt(values)
    wrong = {tuple(error["loc"][:2]) for error in first if len(error["loc"]) > 1}
    for section, key in wrong:
        values[section].pop(key)
    second = _attempt(values)[1] if wrong else []
    first = [error for error in first if error["type"] != "extra_forbidden"]
    conflicts = [error for error in second if error["type"] == "conflict" and error not in first]
    return config, [line for error in (*first, *conflicts) for line in _explain(error, wrong)]


def _attempt(values: dict[str, Any]) -> tuple[RunConfig | None, list[Any]]:
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


#: By the type of pydantic's error; braces are filled from its context.
_REMEDIES = {
    "int_type": "use a whole number",
    "int_from_float": "use a whole number",
    "float_type": "use a number",
    "finite_number": "use a finite number",
    "bool_type": "use true or false",
    "string_type": "use text, in quotes where YAML would read something else",
    "string_unicode": "holds half a surrogate pair; take it out",
    "string_too_short": "must not be empty",
    "list_type": "use a list, such as [a, b]",
    "too_short": "use at least {min_length} entry",
    "literal_error": "use {expected}",
    "greater_than": "use a value above {gt}",
    "greater_than_equal": "use a value of {ge} or more",
    "less_than": "use a value below {lt}",
    "less_than_equal": "use a value of {le} or less",
}


def _explain(error: Any, wrong: set[tuple[Any, ...]]) -> Iterator[str]:
    """`key: value: remedy`; conflicts that involve a value in `wrong` wait until that is right."""
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    key = ".".join(str(part) for part in location[:2])
    if kind == "conflict":
        for keys, text in context["conflicts"]:
            if not any((*location, *name.split(".")) in wrong for name in keys):
                yield f"{key}.{keys[0]}: {text}".removeprefix(".")
        return
    if len(location) == 1:
        yield f"{key}: {_shown(error['input'])}: not a section; write `{key}:` with its keys indented below"
        return
    text = str(context["error"]) if kind == "value_error" else _REMEDIES.get(kind, error["msg"]).format(**context)
    if kind == "literal_error" and isinstance(error["input"], bool):
        text += ", in quotes: YAML reads a bare yes or no as true or false"
    yield f"{key}: {_shown(error['input'])}: {text}"


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return one_line(text, 80)
