"""The `self` source: text the frozen model writes itself."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.progress import Progress
from torch import Tensor

from npt.attach import layer_mode
from npt.data.packing import IGNORED
from npt.errors import DataError
from npt.tuner import device_of, npt_layers


@torch.inference_mode()
def sample_blocks(
    model: Any,
    tokenizer: Any,
    num_blocks: int,
    max_length: int,
    *,
    seed: int,
    batch_size: int = 256,
    cache_dir: str | None = None,
    progress: bool = False,
    label: str = "",
) -> datasets.Dataset:
    """Blocks of `max_length` tokens by plain ancestral sampling: temperature 1, the full distribution, nothing else.

    `generate` is not used, so that no generation_config can change the distribution. A block starts with BOS; sampling
    goes on after an end-of-text token, as in the packed text models are pretrained on, and what directly follows such a
    token does not count (labels -100). The same arguments give the same blocks; (seed, label) name a stream of their
    own that leaves the global random state alone. With `cache_dir`, blocks are kept there, keyed by the model's weights.

    Raises:
        DataError: no token to start from, or max_length beyond the model's context.
    """
    start = _start_token(model, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    if max_length < 2 or (limit is not None and max_length > limit):
        raise DataError(f"data.max_length={max_length}: use 2 to the model's context length, {limit}")
    key = {"weights": fingerprint(model), "seed": seed, "label": label, "blocks": num_blocks, "length": max_length}
    name = hashlib.sha256(json.dumps({**key, "batch": batch_size}, sort_keys=True).encode()).hexdigest()[:24]
    cached = None if cache_dir is None else Path(cache_dir) / name
    if cached is not None and cached.is_dir():
        return datasets.load_from_disk(str(cached))
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    generator = torch.Generator(device_of(model)).manual_seed(int.from_bytes(digest[:7], "big"))
    was_training, layers = model.training, npt_layers(model)
    model.eval()
    rows: list[Tensor] = []
    with Progress(transient=True, disable=not progress) as bar, layer_mode(layers, override="bypass"):
        task = bar.add_task(f"sampling {label} text", total=num_blocks)
        while (done := sum(len(part) for part in rows)) < num_blocks:
            rows.append(_sample(model, min(batch_size, num_blocks - done), max_length, start, generator).cpu())
            bar.update(task, completed=done + len(rows[-1]))
    model.train(was_training)
    blocks = _as_dataset(torch.cat(rows), {start, *_separators(model, tokenizer)})
    if cached is not None:
        temporary = cached.with_name(f".{name}.{os.getpid()}")
        blocks.save_to_disk(str(temporary))
        if cached.is_dir():  # another run was faster
            shutil.rmtree(temporary)
        else:
            os.replace(temporary, cached)
    return blocks


def _sample(model: Any, batch: int, length: int, start: int, generator: torch.Generator) -> Tensor:
    """(batch, length) token ids."""
    ids = torch.full((batch, length), start, device=generator.device)
    past = None
    for position in range(length - 1):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1)
        ids[:, position + 1] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return ids


def _start_token(model: Any, tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(
        "data.dataset_name=self needs a token to start from, and the tokenizer has neither BOS nor EOS; use "
        "dataset_name=text with data_files, or set tokenizer.bos_token"
    )


def _separators(model: Any, tokenizer: Any) -> set[int]:
    eos = model.config.eos_token_id
    return {t for t in (tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])) if t is not None}


def _as_dataset(ids: Tensor, separators: set[int]) -> datasets.Dataset:
    labels = ids.clone()
    ends = torch.isin(ids[:, 1:-1], torch.tensor(sorted(separators)))
    labels[:, 2:][ends] = IGNORED
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    features = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def fingerprint(model: Any) -> str:
    """SHA-256 over the base's config and, per weight, its name, shape and 64 values spread over it."""
    own = {id(p) for layer in npt_layers(model) for p in layer.parameters()}
    config = model.config.to_dict()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            continue
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)].double().cpu()
        digest.update(
            f"{name.removeprefix('base_model.model.')}{tuple(parameter.shape)}".encode() + values.numpy().tobytes()
        )
    return digest.hexdigest()
