"""Fixtures of all tests: checkpoints and their folders, token ids, a browser."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from npt import NPTConfig
from npt.builtin import model_folder
from npt.cli import main
from tests import helpers
from tests.helpers import REPOSITORY, settings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole commands first: they take minutes, and one that began last would keep a second process waiting."""
    items.sort(key=lambda item: "tests/system/" not in item.path.as_posix())


def pytest_collection_finish() -> None:
    """Spares every later garbage collection the million objects of the imported libraries; a run collects several times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """The same for what earlier files imported and keep, such as the compiler and the trackers."""
    gc.collect()
    gc.freeze()


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
def finished_run(local_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run with samples during training and a second text; tests only read it."""
    folder = tmp_path_factory.mktemp("run")
    more = {"data__eval_texts": "[builtin:python-docs]", "training__prediction_logging_steps": 2}
    assert main(["--quiet", "train", *settings(local_model, folder, **more)]) == 0
    return folder


@pytest.fixture
def quick_reports() -> Iterator[None]:
    """For tests that run whole commands and look at neither pictures nor generated text."""
    with helpers.quick_reports():
        yield


@pytest.fixture
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's command reads no task but those of --include_path, as its own thousands take it half a minute, and does
    not ask pip for what is installed.
    """
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    monkeypatch.setattr(manager, "__init__", partialmethod(manager.__init__, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


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
