"""Shared by tests of several folders: random models, a short training run, command lines, a page in a browser."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import beartype  # noqa: F401  imported before `checked_copy` sets TYPE_CHECKING, not within
import pytest
import torch
from jaxtyping import install_import_hook
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from npt import EquivalenceTrainer, NPTConfig, Objective
from npt.adapters.folder import load_adapter
from npt.data import pack_token_ids
from npt.evaluation import generation, least_norm
from npt.training.callbacks import BestAdapterCallback, JsonLinesCallback
from npt.tuner.converted import active_layers

REPOSITORY = Path(__file__).resolve().parents[1]


def _refused_peft() -> str:
    """Why transformers refuses the installed PEFT in add_adapter and its siblings; empty where it takes it."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        return f"transformers' own adapters: {error}"
    return ""


#: Marks tests of transformers' own add_adapter and its siblings, which some of its versions keep for a newer PEFT.
transformers_own_adapters = pytest.mark.skipif(bool(_refused_peft()), reason=_refused_peft())

#: Configuration keys of a whole run that takes seconds; it generates no samples during training and reports on its own text.
SMALL = {
    "data.max_length": 32,
    "data.num_train_samples": 48,
    "data.num_eval_samples": 8,
    "data.num_calibration_samples": 24,
    "data.eval_texts": "[]",
    "training.batch_size": 4,
    "training.num_train_steps": 4,
    "training.logging_steps": 2,
    "training.eval_steps": 2,
    "training.save_steps": 2,
    "training.prediction_logging_steps": 1000,
    "training.warmup_steps": 0,
    "model.rank": 3,
}


# -- models ----------------------------------------------------------------------------------------------------------------


#: Stores of edits that a test opened; tests/editing/conftest.py closes them.
OPEN: list[Any] = []


def random_base(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A random causal LM of 4 blocks whose norms, biases and attention are far from their initial values.

    kind: "gpt2", "llama", or the type of a case of `tests.families`, whose seed is its own.
    """
    torch.manual_seed(seed)
    if kind not in ("gpt2", "llama"):
        from tests.families import CASES

        return next(case for case in CASES if case.model_type == kind).build(dtype)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=96, n_embd=24, n_layer=4, n_head=3, n_positions=128)
        base: Any = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3,
            num_key_value_heads=3, max_position_embeddings=128, pad_token_id=0,
        )  # fmt: skip
        base = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return base.to(dtype).eval()


def randomize(model: Any, scale: float = 0.2, seed: int = 1) -> None:
    """Adds random values to every component parameter, so that no term of a formula is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in active_layers(model):
            for parameter in layer.component.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))


def converted(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A random base converted with random component values."""
    model = get_peft_model(random_base(kind, dtype), NPTConfig(**{"npt_layers": "all", "rank": 3, **options}))
    model.eval()
    randomize(model)
    return model


def checked_as_original(build: Callable[[], Any], ids: torch.Tensor) -> Any:
    """Checks conversions that change nothing, and that a changed one can be switched and taken off. Returns the exact one."""
    base = build()
    expected = base(ids).logits
    exact = get_peft_model(base, NPTConfig(npt_layers="all", carry="exact")).eval()
    assert (exact(ids).logits - expected).abs().max() <= 1e-10 * expected.abs().max()
    # Norms of transformers compute in float32, whatever their input, and so does what can be read off them.
    model = get_peft_model(build(), NPTConfig(npt_layers="all", rank=3, gain="denominator")).eval()
    assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    model = get_peft_model(build(), NPTConfig(npt_layers="all", rank=3)).eval()
    randomize(model)
    assert not torch.equal(model(ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.unload()(ids).logits, expected)
    return exact


def allocated(run: Callable[[], Any]) -> int:
    """The peak, in bytes, of the memory that torch's CPU allocator hands out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# -- a short training run --------------------------------------------------------------------------------------------------


def blocks(count: int = 32, seed: int = 0) -> Any:
    """A data set of `count` blocks of 16 random token ids."""
    ids = torch.randint(3, 96, (count, 16), generator=torch.Generator().manual_seed(seed)).tolist()
    return pack_token_ids(ids, 16, pad_token_id=0)


def trainer(
    folder: Path,
    *,
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    objective: str = "logits",
    steps: int = 8,
    trainer_options: Any = None,
    **options: Any,
) -> Any:
    """An EquivalenceTrainer for a random base, writing to `folder`; `options` are more of its TrainingArguments."""
    model = get_peft_model(random_base(kind, dtype), NPTConfig(npt_layers=[1, 3], rank=3))
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": steps, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 4,
        "save_strategy": "steps", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1, **options,
    }  # fmt: skip
    return EquivalenceTrainer(
        model,
        TrainingArguments(output_dir=str(folder / "checkpoints"), **arguments),
        Objective(objective),
        train_dataset=blocks(),
        eval_dataset=blocks(8, 9),
        callbacks=[JsonLinesCallback(folder / "metrics.jsonl"), BestAdapterCallback(folder / "best_model", model)],
        **(trainer_options or {}),
    )


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Ends the training after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def logged(folder: Path, key: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of every row of `folder`'s metrics.jsonl that has the key."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


class Letters:
    """A tokenizer of single characters."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2, *(3 + ord(c) % 90 for c in text)] for text in texts]}


def spelling_tokenizer(bos: bool = True) -> Any:
    """A tokenizer of single characters for a vocabulary of 96: printable ones of ASCII, without some that no test writes.

    Args:
        bos: put BOS in front of every text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127) if chr(code) not in "~|"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


# -- whole commands and what they write ------------------------------------------------------------------------------------


def settings(local_model: Path, folder: Path, **more: Any) -> list[str]:
    """The --set arguments of a small run into `folder`; `more` are keys with __ for the dot."""
    values = {
        **SMALL,
        "model.base_model_name": local_model,
        "paths.output_dir": folder / "outputs",
        "paths.checkpoint_dir": folder / "checkpoints",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@contextmanager
def quick_reports() -> Iterator[None]:
    """Leaves the plots of reports empty, writes four tokens of each sample and ends the search for the least norm after two
    steps: a third of the time of a small run.
    """
    import pytest  # not on top: a process of tests/distributed_worker.py needs none of these

    from npt.report import plots
    from npt.report.style import Picture

    def draw_picture(name: str, draw: Any, *_: Any) -> Any:
        return Picture(name, name, b"", "<svg></svg>")

    def few(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 4, *more: Any) -> Any:
        return write(model, tokenizer, prompt, min(4, max_new_tokens), *more)

    write = generation.continue_texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "continue_texts", few)
        patch.setattr(plots, "draw_picture", draw_picture)
        patch.setattr(least_norm, "STEPS", 2)
        yield


def visit(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str], list[str]]:
    """(page, lines of its console, addresses that it asked for beside its own)."""
    said: list[str] = []
    asked: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return page, said, [url for url in asked if url != path.as_uri() and not url.startswith("data:")]


def checked_copy(name: str, *others: str) -> ModuleType:
    """A second copy of a module whose annotations jaxtyping checks at every call; `others` are copied with it.

    The package keeps the modules it has: torch.compile could not trace the checks.
    """
    names = [*others, name]
    before = {each: sys.modules.pop(each) for each in names if each in sys.modules}
    try:
        with install_import_hook(names, "beartype.beartype"), mock.patch("typing.TYPE_CHECKING", True):
            return importlib.import_module(name)
    finally:
        for each, module in before.items():
            sys.modules[each] = module
            parent, _, child = each.rpartition(".")
            setattr(importlib.import_module(parent), child, module)


def logits_of(base: Any, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a base with the adapter in a folder."""
    with torch.no_grad():
        found: torch.Tensor = load_adapter(base, adapter)(input_ids=ids).logits
    return found
