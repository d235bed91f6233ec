"""The base model of a configuration, on its device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from npt.block.families import FAMILIES, blocks_of, family_of, resolve_layers
from npt.common.display import one_line
from npt.common.distribution import install_extra
from npt.common.gguf import GGUFError, config_of
from npt.common.places import expanded
from npt.common.precision import DTYPE_REASON, choose_dtype
from npt.common.processes import world
from npt.common.quiet import quiet_transformers
from npt.config import ModelSection, OptimizationSection, RunConfig, with_overrides
from npt.errors import ConversionError, NPTError
from npt.runs.base_adapters import refuse_attached
from npt.runs.base_places import config_place, gguf_named, weights_of
from npt.runs.base_problems import gguf_remedy, hub_remedy, local_remedy
from npt.runs.processes import shards_base
from npt.tuner.converted import npt_layers

logger = logging.getLogger(__name__)


def default_device() -> torch.device:
    """The accelerator, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(
    model: ModelSection | str,
    optimization: OptimizationSection | None = None,
    cache_dir: str | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
) -> tuple[Any, Any]:
    """(causal LM in eval mode on its device, tokenizer) of a base; weights from safetensors only.

    Args:
        model: the section of a configuration, or the base's name: a hub id, a local folder, a GGUF file, or builtin:...
        optimization: how to keep its weights.
        cache_dir: where fetched or converted ones are kept.
        dtype: beside a name, as `model.dtype`: "auto" is the checkpoint's own, or float32 on a CPU without units for that
            (see `npt.common.precision.choose_dtype`).
        revision: of a hub's base.

    Raises:
        NPTError: neither a local folder nor a reachable hub id; its files are damaged, incomplete or of a family that
            can't be converted; or 8-bit without bitsandbytes.
    """
    if isinstance(model, str):
        model = with_overrides(RunConfig(), {"model.base_model_name": model, "model.dtype": dtype}).model
    optimization = optimization or OptimizationSection()
    quantized = optimization.use_8bit or optimization.use_4bit
    bits: dict[str, Any] = _bitsandbytes(4 if optimization.use_4bit else 8) if quantized else {}
    weights_dtype, reason = base_dtype(model, optimization, base_config(model, cache_dir, revision))
    tokenizer = _tokenizer(model, cache_dir, revision)
    with _named(model), quiet_transformers():
        name = weights_of(model, cache_dir)
        # Weights of other shapes are let through to be named below, where the library only points to a log.
        base, found = AutoModelForCausalLM.from_pretrained(
            name, **_arguments(model, cache_dir, revision), dtype=weights_dtype, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **bits,
        )  # fmt: skip
    setattr(base, DTYPE_REASON, reason)
    refuse_attached(f"model.base_model_name={model.base_model_name}", base)
    _check_complete(model.base_model_name, found)
    if not (quantized or optimization.use_cpu_offload or shards_base(optimization.fsdp)):
        base.to(default_device())
    return base.eval(), tokenizer


def load_tokenizer(model: ModelSection, cache_dir: str | None = None, revision: str | None = None) -> Any:
    """The base's tokenizer, once the base's configuration has been checked (see `base_config`)."""
    base_config(model, cache_dir, revision)
    return _tokenizer(model, cache_dir, revision)


def _tokenizer(model: ModelSection, cache_dir: str | None, revision: str | None) -> Any:
    with _named(model), quiet_transformers():
        return AutoTokenizer.from_pretrained(weights_of(model, cache_dir), **_arguments(model, cache_dir, revision))


def base_config(model: ModelSection, cache_dir: str | None = None, revision: str | None = None) -> Any:
    """The base's own configuration (config.json), read before its weights.

    Raises:
        NPTError: missing or damaged; of a family that isn't supported; without the blocks or the size that the `model`
            section asks for.
    """
    where = f"model.base_model_name={model.base_model_name}"
    with _named(model), quiet_transformers():
        name, gguf = config_place(model, cache_dir, where)
        found = (
            AutoConfig.from_pretrained(name, **_arguments(model, cache_dir, revision))
            if gguf is None
            else config_of(gguf)
        )
        text = found.get_text_config()
        blocks, width = (getattr(text, key, None) for key in ("num_hidden_layers", "hidden_size"))
    # Of a model of several parts the text part alone may be what is loaded.
    if not {found.model_type, text.model_type} & set(FAMILIES):
        raise ConversionError(
            f"{where}: model type {found.model_type!r} is not supported; use one of the {len(FAMILIES)} that npt families "
            "lists, or add it with npt.families.register_family(model_type, Family(...))"
        )
    if blocks is not None:
        resolve_layers(model.npt_layers, blocks)
    if width is not None and model.rank > width:
        raise ConversionError(
            f"model.rank={model.rank} is larger than the model's hidden size {width}; use a rank up to that"
        )
    return found


def base_dtype(
    model: ModelSection, optimization: OptimizationSection, hf_config: Any, device: torch.device | None = None
) -> tuple[torch.dtype | str, str]:
    """(dtype that `load_base` loads a base's weights in, why in a few words).

    Args:
        hf_config: the base's (see `base_config`). device: default: `default_device()`.

    Returns:
        "auto" for the dtype where the base's configuration names none and its weights decide.
    """
    if model.dtype != "auto":
        return getattr(torch, model.dtype), "model.dtype"
    own = getattr(hf_config, "dtype", None) or getattr(hf_config.get_text_config(), "dtype", None)
    if own is None or optimization.use_8bit or optimization.use_4bit:
        return "auto", "as the checkpoint"
    own = getattr(torch, own) if isinstance(own, str) else own
    return choose_dtype(own, device or default_device(), lambda: _count(model, hf_config))


def _count(model: ModelSection, hf_config: Any) -> int:
    """The number of parameters of a base, from its configuration."""
    with _named(model), torch.device("meta"):
        base = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=model.trust_remote_code)
        return sum(p.numel() for p in base.parameters())


def _arguments(model: ModelSection, cache_dir: str | None, revision: str | None) -> dict[str, Any]:
    place = {} if revision is None else {"revision": revision}
    return {"cache_dir": cache_dir, "trust_remote_code": model.trust_remote_code, **place}


@contextmanager
def _named(model: ModelSection) -> Iterator[None]:
    """Turns any error of the libraries about a damaged or absent model into one line (tokenizers raises plain Exception)."""
    name = expanded(model.base_model_name)
    try:
        yield
    except GGUFError as error:
        raise NPTError(f"model.base_model_name={model.base_model_name}: {error}") from error
    except (NPTError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        reason = one_line(error, 200) or type(error).__name__
        if "trust_remote_code" in str(error) and not model.trust_remote_code:
            raise NPTError(
                f"model.base_model_name={name!r} brings Python code of its own, which is not run; read that code and set "
                "model.trust_remote_code=true, or name another model"
            ) from error
        if (gguf := gguf_named(name)) is not None:
            raise NPTError(
                f"model.base_model_name={name!r} can't be loaded ({type(error).__name__}: {reason}); "
                f"{gguf_remedy(gguf, error)}"
            ) from error
        if Path(name).is_dir():
            raise NPTError(
                f"model.base_model_name={name!r} can't be loaded ({type(error).__name__}: {reason}); "
                f"{local_remedy(Path(name), error)}"
            ) from error
        raise NPTError(
            f"model.base_model_name={name!r} can't be loaded: it is no local model folder, and the hub did not deliver it "
            f"({reason}); {hub_remedy(error)}"
        ) from error


def _check_complete(name: str, found: Any) -> None:
    """Refuses a checkpoint that lacks weights: transformers fills them with random values and only logs it."""
    for keys, what in (
        (found["mismatched_keys"], "have another shape than config.json says"),
        (found["missing_keys"], "are missing"),
    ):
        if keys:
            first = min(key if isinstance(key, str) else key[0] for key in keys)
            raise NPTError(
                f"model.base_model_name={name!r}: {len(keys)} of the model's weights {what}, first {first}; restore its "
                "*.safetensors and config.json, or name another model"
            )
    if found["unexpected_keys"]:
        keys = sorted(found["unexpected_keys"])
        logger.warning(
            "%s: %d weights of the checkpoint have no place in the model, first %s", name, len(keys), keys[0]
        )


def offload_frozen(model: Any, device: torch.device) -> None:
    """Keeps the frozen weights of all decoder blocks in CPU memory; accelerate brings each to `device` as it is used.

    For a converted model, still on the CPU: components, embeddings and head go to the device and stay there.
    """
    base = model.get_base_model()
    blocks = blocks_of(base)
    ours = {id(m) for layer in npt_layers(model) for m in layer.modules()}
    leaves = [
        m
        for block in blocks
        for m in block.modules()
        if id(m) not in ours and next(m.parameters(False), None) is not None
    ]
    offloaded = {id(m) for m in leaves}
    for module in model.modules():
        if id(module) not in offloaded:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.data = tensor.data.to(device)
                else:
                    setattr(module, name, tensor.to(device))
    for module in leaves:
        cpu_offload(module, execution_device=device)
    # As accelerate's own dispatch leaves it: Trainer and Accelerator then don't try to move the model.
    base.hf_device_map = {"": str(device), family_of(base).blocks: "cpu"}


def _bitsandbytes(bits: int) -> dict[str, Any]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise NPTError(
            f"optimization.use_{bits}bit=true needs bitsandbytes: {install_extra('quantization')}, or set it to false"
        ) from error
    from transformers import BitsAndBytesConfig

    # Four bits as QLoRA sets them (arXiv 2305.14314).
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(**four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    # Over all GPUs of a single process, or each of several processes on its own.
    here = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    device_map = "auto" if world()[1] == 1 else {"": here}
    return {"quantization_config": config, "device_map": device_map}
