"""The model type `npt` of lm-evaluation-harness; importing this module registers it.

The harness loads NPT adapters through its own `hf` type as well (`peft=FOLDER`); this one also knows the builtin
models, takes the base from the adapter, and checks an adapter as `npt evaluate` does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import setup_logging

from npt.adapters.folder import find_adapter, load_adapter
from npt.adapters.settings import load_settings
from npt.common.display import one_line
from npt.common.files import DISK_ERRORS
from npt.common.limits import check_ids, check_length
from npt.config import load_config
from npt.errors import NPTError
from npt.runs.base_model import load_base


@register_model("npt")
class NPTLM(HFLM):  # type: ignore[misc]
    """`--model npt --model_args peft=checkpoints/best_model[,pretrained=BASE,...]`; other arguments are `hf`'s.

    Args:
        peft: adapter folder. pretrained: name or folder of the base, also builtin:...; by default the adapter's own.
        dtype, revision, trust_remote_code: for loading the base, the first as `model.dtype` and by default as the adapter
            was trained with. allow_other_base: as `model.allow_other_base`. kwargs: of the harness's `hf` model.

    Raises:
        CheckpointError: no NPT adapter at `peft`, or its base is not there. NPTError: the base can't be loaded.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        peft: str | None = None,
        *,
        dtype: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        allow_other_base: bool = False,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if pretrained is None and peft is None:
            raise NPTError("the harness's model type npt needs peft=ADAPTER or pretrained=BASE in --model_args")
        named = {"base_model_name": pretrained, "dtype": dtype, "trust_remote_code": trust_remote_code}
        words = [f"model.{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
        words.append("optimization.use_cpu_offload=false")  # where the model is to be is the harness's own choice
        sections = ("model", "optimization")
        run = load_config(None, words) if peft is None else load_settings(peft, overrides=words, sections=sections)
        model, tokenizer = load_base(run.model, run.optimization, revision=revision)
        # The command's default is cuda:0; like the harness's `hf`, take the CPU where there is no such thing.
        absent = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
        if not (absent or run.optimization.use_8bit or run.optimization.use_4bit):
            model.to(device)
        if peft is not None:
            model = load_adapter(model, peft, allow_other_base=allow_other_base)
        if kwargs.get("max_length") is not None:
            check_length(model.config, int(kwargs["max_length"]), "--model_args max_length")
        super().__init__(pretrained=model.eval(), tokenizer=kwargs.pop("tokenizer", tokenizer), **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        check_ids(inps, self.model.get_input_embeddings().weight.shape[0], "a task's text", self.tokenizer)
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        check_ids(context, self.model.get_input_embeddings().weight.shape[0], "a task's prompt", self.tokenizer)
        tokens: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        return tokens


def _with_adapter(arguments: Sequence[str]) -> list[str]:
    """The harness's arguments, with npt's own `--checkpoint FOLDER` as the peft=FOLDER of --model_args.

    Raises:
        CheckpointError: no NPT adapter there. NPTError: it names no folder, or --model_args names an adapter as well.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint", nargs="?", const="")
    known, words = parser.parse_known_args(list(arguments))
    if known.checkpoint is None:
        return words
    if not known.checkpoint:
        raise NPTError("lm-eval --checkpoint: names no folder; write --checkpoint checkpoints/best_model")
    folder = find_adapter(known.checkpoint)
    if any(re.search(r"(^|[=,])peft=", word) for word in words):
        raise NPTError(f"lm-eval --checkpoint {folder}: --model_args names peft= as well; leave one of the two out")
    if "," in str(folder):
        raise NPTError(f"lm-eval --checkpoint {folder}: the harness splits names at a comma; rename the folder")
    for at, word in enumerate(words):
        if word in ("-a", "--model_args"):
            return [*words[: at + 1], f"peft={folder}", *words[at + 1 :]]
        if word.startswith("--model_args="):
            return [*words[:at], f"--model_args=peft={folder},{word.partition('=')[2]}", *words[at + 1 :]]
    return [*words, "--model_args", f"peft={folder}"]


def run_harness(arguments: Sequence[str]) -> None:
    """The harness's own command with `arguments`; its model type is `npt` where none is named, and `--checkpoint FOLDER` is
    the adapter.

    Raises:
        NPTError: what the harness refuses, an unknown task for one.
    """
    words = _with_adapter(arguments)
    named = any(word == "-M" or word.split("=")[0] == "--model" for word in words)
    if words and words[0] not in ("ls", "validate") and not named and not {"-h", "--help"} & set(words):
        words += ["--model", "npt"]
    before, sys.argv = sys.argv, ["npt lm-eval", *words]  # the harness reads sys.argv only
    try:
        setup_logging()
        command = HarnessCLI()
        command.execute(command.parse_args())
    except NPTError:
        raise
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        reason = one_line(error, 400) or type(error).__name__
        raise NPTError(
            f"lm-eval: {type(error).__name__}: {reason}; check --tasks, --model_args, --include_path and the network"
        ) from error
    finally:
        sys.argv = before
