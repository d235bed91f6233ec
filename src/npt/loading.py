"""The base model of a configuration, on its device."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.utils.memory import clear_device_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt.builtin import source_of
from npt.config import RunConfig
from npt.errors import NPTError
from npt.families import blocks_of, family_of
from npt.tuner import npt_layers


def default_device() -> torch.device:
    """The accelerator, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(config: RunConfig) -> tuple[Any, Any]:
    """(causal LM in eval mode on its device, tokenizer) of `model.base_model_name`.

    Raises:
        NPTError: neither a local folder nor a reachable hub id; or 8-bit without bitsandbytes.
    """
    name, options = source_of(config.model.base_model_name), config.optimization
    arguments: dict[str, Any] = {
        "cache_dir": config.paths.cache_dir,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise NPTError(f"model.base_model_name={name}: the folder has no config.json; name a Hugging Face model folder")
    loading = {"dtype": config.model.dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype)}
    quantized = options.use_8bit or options.use_4bit
    if quantized:
        loading |= _bitsandbytes(4 if options.use_4bit else 8)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
        model = AutoModelForCausalLM.from_pretrained(name, **arguments, **loading)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NPTError(
            f"model.base_model_name={name!r} can't be loaded: it is no local model folder, and the hub did not deliver it "
            f"({reason}); check the name, the network or `hf auth login`, or give the path of a local folder "
            "(builtin:tiny needs nothing)"
        ) from error
    if not quantized and not options.use_cpu_offload:
        model.to(default_device())
    return model.eval(), tokenizer


def release_memory() -> None:
    """Gives back what the last phase of a run has freed: the device's cache, and on Linux the C library's heap, which
    else keeps hundreds of megabytes in pieces under the next phase's large tensors."""
    clear_device_cache(garbage_collection=True)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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
            f"optimization.use_{bits}bit=true needs bitsandbytes: pip install 'npt[quantization]', or set it to false"
        ) from error
    from transformers import BitsAndBytesConfig

    # Four bits as QLoRA sets them (arXiv 2305.14314).
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(**four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": "auto"}
