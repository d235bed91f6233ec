"""The model type `npt` of lm-evaluation-harness; importing this module registers it.

The harness loads NPT adapters through its own `hf` type as well (`peft=FOLDER`); this one also knows the builtin
models, takes the base from the adapter, and checks an adapter as `npt evaluate` does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import setup_logging
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt.adapters.folder import load_adapter, resolve_checkpoint
from npt.builtin import source_of
from npt.errors import NPTError
from npt.runs.base_adapters import refuse_adapter, refuse_attached
from npt.runs.base_model import default_device
from npt.tuner.config import NPTConfig


@register_model("npt")
class NPTLM(HFLM):  # type: ignore[misc]
    """`--model npt --model_args peft=checkpoints/best_model[,pretrained=BASE,...]`; other arguments are `hf`'s.

    Args:
        peft: adapter folder. pretrained: name or folder of the base, also builtin:...; the adapter's own by default.
        dtype, revision, trust_remote_code: for loading the base. kwargs: of the harness's `hf` model.

    Raises:
        CheckpointError: no NPT adapter at `peft`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        peft: str | None = None,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        folder = None if peft is None else resolve_checkpoint(peft)
        name = pretrained
        if name is None and folder is not None:
            name = NPTConfig.from_pretrained(str(folder)).base_model_name_or_path
        if name is None:
            raise NPTError("the harness's model type npt needs peft=ADAPTER or pretrained=BASE in --model_args")
        source = source_of(name)
        refuse_adapter(f"pretrained={name}", Path(source))
        loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(source, **loading)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **loading)
        refuse_attached(f"pretrained={name}", model)
        # The command's default is cuda:0; like the harness's `hf`, take the CPU where there is no such thing.
        absent = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
        model.to(default_device() if absent else device)
        if folder is not None:
            model = load_adapter(model, folder)
        super().__init__(pretrained=model.eval(), tokenizer=kwargs.pop("tokenizer", tokenizer), **kwargs)


def run_harness(arguments: Sequence[str]) -> None:
    """The harness's own command with `arguments`; its model type is `npt` where none is named.

    Raises:
        NPTError: what the harness refuses, an unknown task for one.
    """
    words = list(arguments)
    named = any(word == "-M" or word.split("=")[0] == "--model" for word in words)
    if words and words[0] not in ("ls", "validate") and not named and not {"-h", "--help"} & set(words):
        words += ["--model", "npt"]
    before, sys.argv = sys.argv, ["npt lm-eval", *words]  # the harness reads sys.argv only
    try:
        setup_logging()
        command = HarnessCLI()
        command.execute(command.parse_args())
    except ValueError as error:
        raise NPTError(f"lm-eval: {error}") from error
    finally:
        sys.argv = before
