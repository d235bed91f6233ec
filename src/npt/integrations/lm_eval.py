"""The model type `npt` of lm-evaluation-harness; importing this module registers it.

The harness loads NPT adapters through its own `hf` type as well (`peft=FOLDER`); this one also knows the builtin
models, takes the base from the adapter, and checks an adapter as `npt evaluate` does.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import lm_eval
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
from npt.integrations.paired import Comparison, comparisons
from npt.runs.base_model import load_base

logger = logging.getLogger(__name__)


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
    """The harness's arguments, with npt's own `--checkpoint FOLDER` as the peft=FOLDER of --model_args, and without
    `--no-base`. The harness's options may have dashes, as npt's do.

    Raises:
        CheckpointError: no NPT adapter there. NPTError: it names no folder, --model_args names an adapter as well, or
            --no-base without --checkpoint.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint", nargs="?", const="")
    parser.add_argument("--no-base", action="store_true")
    known, rest = parser.parse_known_args(list(arguments))
    words = [_underscored(word) for word in rest]
    if known.checkpoint is None:
        if known.no_base:
            raise NPTError("lm-eval --no-base: only --checkpoint FOLDER scores the base as well; leave --no-base out")
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


def _underscored(word: str) -> str:
    """An option as the harness writes it: --include_path for --include-path."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word


def run_harness(arguments: Sequence[str]) -> list[Comparison]:
    """The harness's own command with `arguments`; its model type is `npt` where none is named, and `--checkpoint FOLDER` is
    the adapter. With `--checkpoint` and without `--no-base` the base is scored on the same items.

    Returns:
        The comparison with the base for each task and metric; none where the base was not scored. It is also the entry
        `comparison` of the results that the harness writes.

    Raises:
        NPTError: what the harness refuses, an unknown task for one.
    """
    words = _with_adapter(arguments)
    named = any(word == "-M" or word.split("=")[0] == "--model" for word in words)
    if words and words[0] not in ("ls", "validate") and not named and not {"-h", "--help"} & set(words):
        words += ["--model", "npt"]
    with_base = any(word.split("=")[0] == "--checkpoint" for word in arguments) and "--no-base" not in arguments
    before, sys.argv = sys.argv, ["npt lm-eval", *words]  # the harness reads sys.argv only
    try:
        setup_logging()
        command = HarnessCLI()
        with _scored_beside_the_base(with_base) as found:
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
    return found


@contextmanager
def _scored_beside_the_base(wanted: bool) -> Iterator[list[Comparison]]:
    """The harness's command scores the base of an NPT model too; afterwards the list holds the comparison.

    Its command takes `simple_evaluate` from its package when it runs and has no place of its own for a second model.
    """
    found: list[Comparison] = []
    score = lm_eval.simple_evaluate
    if wanted:
        lm_eval.simple_evaluate = lambda **options: _score_both(score, options, found)
    try:
        yield found
    finally:
        lm_eval.simple_evaluate = score


def _score_both(score: Callable[..., Any], options: dict[str, Any], found: list[Comparison]) -> Any:
    """The harness's results of the NPT model, with the comparison in `found`; one model is loaded, and switched."""
    if options["model"] != "npt" or options.get("predict_only"):
        logger.info("the base is not scored: that needs the model type npt and metrics")
        return score(**options)
    sizes = {key: options[key] for key in ("batch_size", "max_batch_size", "device")}
    lm = NPTLM.create_from_arg_obj(options["model_args"], sizes)
    npt = score(**{**options, "model": lm, "log_samples": True})
    once: dict[str, Any] = {"evaluation_tracker": None, "write_out": False, "check_integrity": False}
    once |= {"rewrite_requests_cache": False, "delete_requests_cache": False}
    once["bootstrap_iters"] = 0  # of these figures' errors only those of the comparison are shown
    if options["use_cache"] is not None:  # it keeps the answers of one model
        once["use_cache"] = f"{options['use_cache']}_base"
    logger.info("the base on the same items")
    with lm.model.disable_adapter():
        base = score(**{**options, **once, "model": lm, "log_samples": True})
    if npt is None or base is None:  # only the first process has results
        return npt
    compared, left_out = comparisons(base, npt)
    found += compared
    if left_out:
        logger.info("not compared, being neither means over items nor perplexities: %s", ", ".join(left_out))
    npt["config"]["model"] = "npt"
    npt["comparison"] = [asdict(each) for each in compared]
    if tracker := options["evaluation_tracker"]:
        tracker.general_config_tracker.model_source = "npt"
    if not options["log_samples"]:
        del npt["samples"]
    return npt
