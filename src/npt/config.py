"""The run configuration: typed YAML with dotted overrides, every problem reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from npt.errors import ConfigError


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; a person means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Projection = Literal["gate", "up", "down"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)


class ModelSection(_Section):
    """Which model, and which of its blocks become neuro-plastic, how."""

    base_model_name: Annotated[str, Field(min_length=1)] = "meta-llama/Llama-3.2-1B"
    npt_layers: Literal["upper_half", "lower_half", "all"] | Annotated[list[int], Field(min_length=1)] = "upper_half"
    rank: Annotated[int, Field(ge=0)] = 16
    modulation_scale: Annotated[Real, Field(gt=0)] = 1.0
    key: Literal["input", "tied", "learned"] = "input"
    carry: Literal["none", "diagonal", "exact"] = "diagonal"
    gain: Literal["none", "norm", "overlap", "state"] = "state"
    low_rank_at: Literal["input", "projection"] = "input"
    target_projections: Annotated[list[Projection], Field(min_length=1)] = ["gate", "up", "down"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ModelSection:
        if self.key == "tied" and "down" in self.target_projections and self.rank and self.carry != "exact":
            raise ValueError("key 'tied' can't target 'down'; set model.target_projections=[gate, up] or key=input")
        for name in ("npt_layers", "target_projections"):
            value = getattr(self, name)
            if isinstance(value, list) and len(set(value)) != len(value):
                raise ValueError(f"{name} {value} names an entry twice; name each once")
        return self


class TrainingSection(_Section):
    """How long and towards what to train; `num_train_steps` null = epochs, 0 = calibration only."""

    batch_size: Positive = 16
    gradient_accumulation_steps: Positive = 1
    learning_rate: Annotated[Real, Field(gt=0)] = 1e-3
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    num_epochs: Annotated[Real, Field(gt=0)] = 1.0
    num_train_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Real, Field(gt=0)] = 1.0
    objective: Literal["auto", "local", "logits", "composite"] = "auto"
    regularizer: Literal["factors", "delta"] = "delta"
    equivalence_weight: Annotated[Real, Field(ge=0)] = 1.0
    regularization_weight: Annotated[Real, Field(ge=0)] = 0.0
    calibrate: bool = True
    gradient_checkpointing: bool = False
    logging_steps: Positive = 10
    prediction_logging_steps: Positive = 150
    eval_steps: Positive = 50
    save_steps: Positive = 50
    report_to: list[str] = []
    seed: Annotated[int, Field(ge=0)] = 0


class DataSection(_Section):
    """Text: `self` (the frozen model's own), `text` with data_files, or a hub id. A sample is a block of max_length."""

    dataset_name: Annotated[str, Field(min_length=1)] = "self"
    dataset_config: str | None = None
    data_files: list[str] | None = None
    calibration_files: list[str] | None = None
    text_column: str = "text"
    max_length: Annotated[int, Field(ge=2)] = 256
    num_train_samples: Positive | None = 1632
    num_eval_samples: Positive | None = 400
    num_calibration_samples: Positive = 384

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if self.dataset_name == "text" and not self.data_files:
            raise ValueError("dataset_name 'text' needs data.data_files=[FILE, ...]")
        if self.dataset_name == "self" and None in (self.num_train_samples, self.num_eval_samples):
            raise ValueError("dataset_name 'self' needs whole numbers for num_train_samples and num_eval_samples")
        return self


class WandbSection(_Section):
    """Weights & Biases; WANDB_MODE=offline works as usual."""

    enabled: bool = False
    project: str = "npt"
    entity: str | None = None
    tags: list[str] = []


class OptimizationSection(_Section):
    """Memory: see MEMORY_OPTIMIZATION.md."""

    use_cpu_offload: bool = False
    use_8bit: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"


class PathsSection(_Section):
    """Where things go; `cache_dir` null = the libraries' own caches, and sampled text is not kept."""

    output_dir: str = "outputs"
    checkpoint_dir: str = "checkpoints"
    cache_dir: str | None = None


class RunConfig(_Section):
    """Everything a run needs."""

    model: ModelSection = Field(default_factory=ModelSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    data: DataSection = Field(default_factory=DataSection)
    wandb: WandbSection = Field(default_factory=WandbSection)
    optimization: OptimizationSection = Field(default_factory=OptimizationSection)
    paths: PathsSection = Field(default_factory=PathsSection)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of a silent overwrite."""


def _unique_mapping(loader: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.YAMLError(f"key {key!r} in line {key_node.start_mark.line + 1} is not text")
        if key in seen:
            raise yaml.YAMLError(f"key {key!r} stands twice, again in line {key_node.start_mark.line + 1}; keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep)  # type: ignore[no-any-return]


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


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
    problems += [_unknown(key) for key in _unknown_keys(values)]
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += [_explain(e) for e in error.errors() if e["type"] != "extra_forbidden"]
    if problems:
        raise ConfigError(f"{path or 'configuration'}: " + "; ".join(dict.fromkeys(problems)))
    return config


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes a configuration as YAML, every key."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path}: no such file; name a YAML file, e.g. config.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected sections like `model:`, found {type(values).__name__}")
    return values


def _override(values: dict[str, Any], override: str) -> str | None:
    """Applies one override; returns what is wrong with it, if anything."""
    dotted, separator, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not separator or len(parts) != 2 or not all(parts):
        return f"--set {override}: write section.key=value, e.g. training.num_train_steps=100"
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        return f"--set {override}: the value is not YAML ({' '.join(str(error).split())[:80]})"
    section = values.get(parts[0])
    if section is None:
        section = values[parts[0]] = {}
    if isinstance(section, dict):
        section[parts[1]] = value
    return None


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
    known = known_keys()
    leaf = key.rsplit(".", 1)[-1]
    same = [name for name in known if name.rsplit(".", 1)[1] == leaf]
    leaves = {name.rsplit(".", 1)[1]: name for name in known}
    sections = list(RunConfig.model_fields) if "." not in key else []
    near = same or difflib.get_close_matches(key, [*known, *sections], 1, 0.7)
    near = near or [leaves[m] for m in difflib.get_close_matches(leaf, leaves, 1)]
    return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else f"; sections: {', '.join(RunConfig.model_fields)}")


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"] if not str(part).startswith(("literal[", "constrained", "list[", "function"))]
    key = ".".join(location[:2]) or "configuration"
    if error["type"] == "value_error":
        return f"{key}: {str(error['ctx']['error'])}"
    value = repr(error["input"])
    return f"{key}: {value if len(value) < 80 else value[:77] + '...'}: {error['msg'][0].lower() + error['msg'][1:]}"
