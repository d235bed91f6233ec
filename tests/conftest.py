"""Fixtures: small random models, and the real checkpoint where it is at hand."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from npt import NPTConfig
from npt.builtin import model_folder
from npt.tuner.converted import active_layers

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with a real checkpoint and real text; a user does not have it."""
    folder = Path(os.environ.get("NPT_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models" / "stories260k" / "config.json").is_file():
        pytest.skip(f"no real checkpoint at {folder} (set NPT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def stories(shared_dir: Path) -> Path:
    """The real checkpoint's folder."""
    return shared_dir / "models" / "stories260k"


@pytest.fixture(scope="session", params=["builtin:tiny", "stories260k"])
def pretrained(request: pytest.FixtureRequest) -> Path:
    """The folder of a pretrained checkpoint: the one in the package, and the real one where it is at hand."""
    if request.param == "builtin:tiny":
        return model_folder(request.param)
    folder: Path = request.getfixturevalue("stories")
    return folder


@pytest.fixture
def pretrained_model(pretrained: Path) -> Callable[..., Any]:
    """Builds (model, tokenizer): a pretrained checkpoint, converted with NPTConfig(**options)."""

    def build(**options: Any) -> tuple[Any, Any]:
        base = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
        return get_peft_model(base, NPTConfig(**options)), AutoTokenizer.from_pretrained(pretrained)

    return build


def random_base(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A random causal LM of 4 blocks whose norms, biases and attention are far from their initial values."""
    torch.manual_seed(seed)
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
    """Random values in every component parameter, so that no term of a formula is zero."""
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


def allocated(run: Callable[[], Any]) -> int:
    """Peak of what torch's CPU allocator hands out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.fixture
def token_ids() -> torch.Tensor:
    """(2, 9) token ids."""
    return torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def local_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 4-block Llama and a byte-level tokenizer: what a user without a hub could name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def browser() -> Any:
    """A headless Chromium: the system's, or the one `playwright install chromium` fetched."""
    sync_api = pytest.importorskip("playwright.sync_api")
    system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()
