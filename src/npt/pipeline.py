"""Runs from a configuration: load, convert, calibrate, train, evaluate. The command is a thin layer over this."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from npt.calibration import calibrate
from npt.checkpoints import load_adapter, set_aside
from npt.config import RunConfig, load_config, save_config
from npt.data import load_documents, pack, sample_blocks, split_blocks
from npt.errors import CheckpointError, ConfigError, NPTError
from npt.evaluation import evaluate
from npt.evaluation.divergence import batches_of
from npt.objectives import Objective
from npt.training import (
    BestAdapterCallback,
    EquivalenceTrainer,
    JsonLinesCallback,
    SamplesCallback,
    append_json,
    torch_dtype,
    write_json,
)
from npt.tuner import NPTConfig, adapter_config, device_of, parameter_counts

logger = logging.getLogger(__name__)

#: Blocks taken from the end of the training set to choose the best adapter by.
VALIDATION_BLOCKS = 32
#: Evaluations without a new best after which objective `auto` stops.
PATIENCE = 4
RUN_CONFIG = "npt_run.yaml"


def default_device() -> torch.device:
    """The accelerator, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(config: RunConfig) -> tuple[Any, Any]:
    """(causal LM in eval mode on its device, tokenizer) of `model.base_model_name`.

    Raises:
        NPTError: neither a local folder nor a reachable hub id; or 8-bit without bitsandbytes.
    """
    name, options = config.model.base_model_name, config.optimization
    arguments: dict[str, Any] = {
        "cache_dir": config.paths.cache_dir,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise NPTError(f"model.base_model_name={name}: the folder has no config.json; name a Hugging Face model folder")
    loading = {"dtype": torch_dtype(config.model.dtype)}
    if options.use_8bit:
        loading |= _eight_bit()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
        model = AutoModelForCausalLM.from_pretrained(name, **arguments, **loading)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NPTError(
            f"model.base_model_name={name!r} can't be loaded: it is no local model folder, and the hub did not deliver it "
            f"({reason}); check the name, the network or `hf auth login`, or give the path of a local folder"
        ) from error
    device = default_device()
    if options.use_cpu_offload and device.type == "cuda":
        cpu_offload(model, execution_device=device)
    elif not options.use_8bit:
        model.to(device)
    return model.eval(), tokenizer


def _eight_bit() -> dict[str, Any]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise NPTError(
            "optimization.use_8bit=true needs bitsandbytes: pip install 'npt[quantization]', or set it to false"
        ) from error
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "auto"}


def npt_config(config: RunConfig) -> NPTConfig:
    """The adapter's configuration: the `model` section without what belongs to the base."""
    m = config.model
    return NPTConfig(
        npt_layers=m.npt_layers,
        rank=m.rank,
        modulation_scale=m.modulation_scale,
        key=m.key,
        carry=m.carry,
        gain=m.gain,
        low_rank_at=m.low_rank_at,
        target_projections=list(m.target_projections),
    )


def corpus_blocks(config: RunConfig, model: Any, tokenizer: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training blocks, held-out blocks) of the `data` section."""
    data: Any = config.data
    seed = config.training.seed
    if data.dataset_name == "self":
        common: dict[str, Any] = {"seed": seed, "cache_dir": data_cache(config), "progress": True}
        train = sample_blocks(model, tokenizer, data.num_train_samples, data.max_length, label="train", **common)
        held_out = sample_blocks(model, tokenizer, data.num_eval_samples, data.max_length, label="eval", **common)
        return train, held_out
    return split_blocks(_text_blocks(config, tokenizer), data.num_train_samples, data.num_eval_samples)


def _text_blocks(config: RunConfig, tokenizer: Any) -> datasets.Dataset:
    data = config.data
    documents = load_documents(
        data.dataset_name,
        dataset_config=data.dataset_config,
        data_files=data.data_files or (),
        text_column=data.text_column,
        cache_dir=config.paths.cache_dir,
    )
    local = data.dataset_name == "text"
    wanted = (data.num_train_samples or 0) + (data.num_eval_samples or 0)
    # A hub dataset can be far larger than what is asked for; local files are packed whole, held-out text at the end.
    return pack(documents, tokenizer, data.max_length, max_blocks=None if local else wanted or None, progress=True)


def check_text_files(config: RunConfig, more: Sequence[str | Path] = ()) -> None:
    """Reads every local text file once, so that a bad one is named before anything long starts."""
    data = config.data
    local = data.data_files if data.dataset_name == "text" else None
    for files in (local, data.calibration_files, more):
        if files:
            load_documents("text", data_files=files, text_column=data.text_column)


def data_cache(config: RunConfig) -> str | None:
    """Where sampled text is kept; with no cache_dir, nothing is."""
    return None if config.paths.cache_dir is None else str(Path(config.paths.cache_dir) / "npt_samples")


def calibration_batches(
    config: RunConfig, tokenizer: Any, train: datasets.Dataset, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Half of the calibration text from the training set, half from `calibration_files` where there are any; mixed."""
    count = config.data.num_calibration_samples
    files = config.data.calibration_files or []
    if not files:
        return list(batches_of(train.select(range(min(count, len(train)))), 16, device))
    documents = load_documents("text", data_files=files, text_column=config.data.text_column)
    prose = pack(documents, tokenizer, config.data.max_length)
    prose = prose.shuffle(seed=config.training.seed).select(range(min(count // 2, len(prose))))
    own = train.select(range(min(count - len(prose), len(train))))
    mixed = datasets.concatenate_datasets([own, prose.cast(own.features)]).shuffle(seed=config.training.seed)
    return list(batches_of(mixed, 16, device))


def run_training(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Phase 1 from a configuration; returns the evaluation report it also writes.

    Leaves the adapter in <checkpoint_dir>/best_model and config.yaml, metrics.jsonl, samples.jsonl and
    evaluation_report.json in <output_dir>. What an earlier run left there is moved to `previous-<n>`.

    Raises:
        NPTError: bad input, before any long work; `resume` without a checkpoint.
    """
    output, checkpoints = Path(config.paths.output_dir), Path(config.paths.checkpoint_dir)
    last = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    if resume and last is None:
        raise CheckpointError(f"paths.checkpoint_dir={checkpoints} holds no checkpoint to resume; run without --resume")
    check_text_files(config)
    set_seed(config.training.seed)
    adapter = npt_config(config)
    prepare_wandb(config)
    base, tokenizer = load_base(config)
    model = get_peft_model(base, adapter)
    own, frozen = parameter_counts(model)
    logger.info(
        "blocks %s are now neuro-plastic: %s new parameters (%.3g %% of %s)",
        adapter_config(model).npt_layers, f"{own:,}", 100 * own / frozen, f"{frozen:,}",
    )  # fmt: skip
    train, held_out = corpus_blocks(config, model, tokenizer)
    if not resume:
        set_aside(output, ("metrics.jsonl", "samples.jsonl", "evaluation_report.json", "plots"))
        set_aside(checkpoints, ("best_model", "checkpoint-*"))
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / "config.yaml")
    if not resume and config.training.calibrate and config.model.carry != "exact":
        errors = calibrate(model, calibration_batches(config, tokenizer, train, device_of(model)), progress=True)
        append_json(output / "metrics.jsonl", {"step": 0, "calibration": errors})
        for name, figures in errors.items():
            logger.info("%s: update error %.4f -> %.4f", name, figures["error_before"], figures["error_after"])
    trainer = make_trainer(config, model, tokenizer, train)
    steps = trainer.args.max_steps
    if not resume:
        trainer.evaluate()
    if steps != 0 and config.model.carry != "exact":
        trainer.train(resume_from_checkpoint=last)
        if trainer.state.global_step % (trainer.args.eval_steps or 1):
            trainer.evaluate()
    best = checkpoints / "best_model"
    save_config(config, best / RUN_CONFIG)
    tokenizer.save_pretrained(str(best))
    set_peft_model_state_dict(model, load_peft_weights(str(best), device=str(device_of(model))))
    report = evaluate(
        model, tokenizer, {config.data.dataset_name: held_out},
        context_length=config.data.max_length, seed=config.training.seed, progress=True,
    )  # fmt: skip
    write_json(output / "evaluation_report.json", report)
    return report


def make_trainer(config: RunConfig, model: Any, tokenizer: Any, train: datasets.Dataset) -> EquivalenceTrainer:
    """The trainer with its callbacks; the last blocks of the training set choose the best adapter."""
    validation = min(VALIDATION_BLOCKS, max(1, len(train) // 10))
    if len(train) <= validation:
        raise NPTError(f"{len(train)} training block(s) are too few; raise data.num_train_samples or give more text")
    fit, chosen_by = (
        train.select(range(len(train) - validation)),
        train.select(range(len(train) - validation, len(train))),
    )
    output, t = Path(config.paths.output_dir), config.training
    return EquivalenceTrainer(
        model,
        training_arguments(config),
        objective_schedule(config, len(fit)),
        train_dataset=fit,
        eval_dataset=chosen_by,
        callbacks=[
            JsonLinesCallback(output / "metrics.jsonl"),
            SamplesCallback(output / "samples.jsonl", model, tokenizer, t.prediction_logging_steps),
            BestAdapterCallback(
                Path(config.paths.checkpoint_dir) / "best_model", model, PATIENCE if t.objective == "auto" else None
            ),
        ],
    )


def objective_schedule(config: RunConfig, blocks: int) -> list[tuple[int, Objective]]:
    """[(first step, objective)]. `auto` is `logits` after a calibration; without one, `local` for the first half."""
    t = config.training
    per_epoch = -(-blocks // (t.batch_size * t.gradient_accumulation_steps))
    steps = int(per_epoch * t.num_epochs) if t.num_train_steps is None else t.num_train_steps
    names = {"auto": ["logits"] if t.calibrate else ["local", "logits"]}.get(t.objective, [t.objective])
    return [
        (
            index * steps // len(names),
            Objective(
                name,
                equivalence_weight=t.equivalence_weight,
                regularization_weight=t.regularization_weight,
                regularizer=t.regularizer,
            ),
        )
        for index, name in enumerate(names)
    ]


def training_arguments(config: RunConfig) -> TrainingArguments:
    """HF's TrainingArguments from the `training`, `optimization` and `wandb` sections."""
    t = config.training
    return TrainingArguments(
        output_dir=config.paths.checkpoint_dir,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        num_train_epochs=t.num_epochs,
        max_steps=-1 if t.num_train_steps is None else t.num_train_steps,
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        logging_steps=t.logging_steps,
        eval_strategy="steps",
        eval_steps=t.eval_steps,
        save_steps=t.save_steps,
        save_total_limit=3,
        seed=t.seed,
        fp16=config.optimization.mixed_precision == "fp16",
        bf16=config.optimization.mixed_precision == "bf16",
        # The old name draws a warning in transformers 5.23, and the new one does not exist before it.
        **({"gradient_checkpointing": True} if t.gradient_checkpointing else {}),
        use_cpu=not torch.cuda.is_available(),
        report_to=[*t.report_to, *(["wandb"] if config.wandb.enabled else [])],
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def prepare_wandb(config: RunConfig) -> None:
    """Starts the run HF's callback will log to. WANDB_MODE=offline works as usual.

    Raises:
        ConfigError: wandb is switched on but not installed.
    """
    if not config.wandb.enabled:
        return
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "wandb.enabled=true needs the package: pip install 'npt[wandb]', or set it to false"
        ) from error
    w = config.wandb
    wandb.init(project=w.project, entity=w.entity, tags=list(w.tags or ()), config=config.model_dump())


def load_npt(config: RunConfig, checkpoint: str | Path) -> tuple[PeftModel, Any]:
    """(NPT model, tokenizer): the base of the configuration with the adapter at `checkpoint` (see `load_adapter`)."""
    base, tokenizer = load_base(config)
    return load_adapter(base, checkpoint), tokenizer


def run_evaluation(
    config: RunConfig, checkpoint: str | Path, output: str | Path, *, more_text: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Evaluates a checkpoint on the configuration's data, and on each file of `more_text` beside; writes the report.

    Text the adapter was trained on is split as in training and only its held-out part is used; other text is used
    whole, up to data.num_eval_samples blocks.
    """
    check_text_files(config, more_text)
    model, tokenizer = load_npt(config, checkpoint)
    corpora: dict[str, Any] = {config.data.dataset_name: evaluation_blocks(config, checkpoint, model, tokenizer)}
    for path in more_text:
        documents = load_documents("text", data_files=[path], text_column=config.data.text_column)
        corpora[Path(path).stem] = pack(
            documents, tokenizer, config.data.max_length, max_blocks=config.data.num_eval_samples
        )
    report = evaluate(
        model, tokenizer, corpora,
        context_length=config.data.max_length, seed=config.training.seed, progress=True,
    )  # fmt: skip
    write_json(Path(output), report)
    return report


def evaluation_blocks(config: RunConfig, checkpoint: str | Path, model: Any, tokenizer: Any) -> datasets.Dataset:
    """The held-out blocks of the configuration's data."""
    data: Any = config.data
    if data.dataset_name == "self":
        return sample_blocks(
            model, tokenizer, data.num_eval_samples, data.max_length,
            seed=config.training.seed, label="eval", cache_dir=data_cache(config), progress=True,
        )  # fmt: skip
    blocks = _text_blocks(config, tokenizer)
    if trained_on(config, Path(checkpoint)):
        return split_blocks(blocks, data.num_train_samples, data.num_eval_samples)[1]
    return blocks if data.num_eval_samples is None else blocks.select(range(min(data.num_eval_samples, len(blocks))))


def trained_on(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the adapter's own record says that it was trained on this configuration's text."""
    record = checkpoint.with_suffix("") / RUN_CONFIG
    if not record.is_file():
        return True  # unknown: take the careful split
    theirs = load_config(record).data

    def source(data: Any) -> tuple[Any, ...]:
        files: Iterable[str] = [*(data.data_files or ()), *(data.calibration_files or ())]
        return data.dataset_name, data.dataset_config, frozenset(str(Path(f).resolve()) for f in files)

    mine, trained = source(config.data), source(theirs)
    return mine[:2] == trained[:2] and (mine[0] != "text" or bool(mine[2] & trained[2]))


def disk_usage(path: Path) -> int:
    """Free bytes where `path` will be written."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def read_report(path: Path) -> dict[str, Any]:
    """An evaluation report from disk."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
