"""The weight delta as a LoRA: for PEFT and servers of Hugging Face models, and as GGUF for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from npt.adapters.folder import WEIGHTS
from npt.builtin import recorded_name
from npt.common.display import one_line
from npt.common.files import write_file, write_tensors
from npt.common.writable import check_file
from npt.editing.measure import holding
from npt.editing.solve import Factors, Pairs, gram_of, lengths
from npt.errors import CheckpointError, NPTError

if TYPE_CHECKING:
    from npt.editing.store import EditStore

#: Ranks that servers accept (vLLM's max_lora_rank); a LoRA is padded with zeros to the next one.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: {model type of transformers: architecture of llama.cpp}, where the two names differ.
_ARCHITECTURES = {
    "mistral": "llama", "phi": "phi2", "gemma3_text": "gemma3", "gpt_neox": "gptneox", "cohere": "command-r", "glm": "chatglm",
    "ministral": "llama", "hunyuan_v1_dense": "hunyuan-dense", "ministral3": "mistral3", "gpt_bigcode": "starcoder",
    "qwen3_5_text": "qwen35", "olmo3": "olmo2",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """A LoRA of one projection, scale 1. a: (rank, f). b: (d, rank). lost: ids of edits that its rank does not hold."""

    a: Tensor
    b: Tensor
    lost: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Rows of a."""
        return len(self.a)


def facts_in_rank(store: EditStore) -> tuple[dict[int, Factors], tuple[str, ...]]:
    """({block: weight delta of the facts, of a rank that servers accept}, ids of facts that are lost by that)."""
    pairs, whole = store.pairs, store.factors
    if all(len(own) <= RANKS[-1] for own in pairs.values()):
        return whole, ()
    found = {
        layer: _within_ranks(factors) if store.joint.trained else truncated(factors, pairs[layer], RANKS[-1])
        for layer, factors in whole.items()
    }
    return found, _lost(store, found)


def rank_for(keys: int) -> int:
    """The rank of the LoRA that so many keys are saved as."""
    return next((rank for rank in RANKS if rank >= keys), RANKS[-1])


def _balance(a: Tensor, b: Tensor) -> Tensor:
    one, other = a.norm(dim=1), b.norm(dim=0)
    usable = (one > 0) & (other > 0)
    return torch.where(usable, (other / one.clamp_min(1e-300)).sqrt(), torch.ones_like(one))


def truncated(factors: Factors, pairs: Pairs, rank: int) -> Factors:
    """The weight delta of that rank which is nearest in the metric, tr(dW C dW^T).

    right C right^T = S^-1 G S^-1 with G the keys' Gram matrix, so C itself is not needed.
    """
    scaled = (pairs.keys * lengths(pairs).rsqrt()).T
    # right = (G + rho)^-1 K^T M, so right K = (G + rho)^-1 G; and right C right^T = (right K) (G + rho)^-1.
    inverse_gram = factors.right @ scaled.T
    gram = gram_of(pairs)
    middle = inverse_gram @ torch.linalg.pinv(gram, hermitian=True) @ inverse_gram.T
    values, vectors = torch.linalg.eigh((middle + middle.T) / 2)
    root = vectors * values.clamp_min(0).sqrt()
    left = torch.linalg.svd(factors.left @ root, full_matrices=False)[0][:, :rank]
    return Factors(left, left.T @ factors.left @ factors.right)


def _lost(store: EditStore, factors: Mapping[int, Factors], joint: Sequence[int] = ()) -> tuple[str, ...]:
    """Ids of facts that hold with everything at work and not with `factors` in their blocks.

    Args:
        store: with its edits at work.
        factors: {block: the weight delta instead of that of the facts}, of every block with facts.
        joint: blocks where it stands for the contexts' weight delta too.
    """
    edits = store.facts
    ask = holding(store.bench, [edit.request for edit in edits])
    whole = ask()
    try:
        store.bench.set(factors)
        with ExitStack() as stack:
            for layer in joint:
                stack.enter_context(store.contexts.patches.off(layer))
            left = ask()
    finally:
        store.bench.set(store.factors)
    return tuple(edit.id for edit, one, other in zip(edits, whole, left, strict=True) if one and not other)


def loras_of(store: EditStore) -> dict[str, Lora]:
    """{projection: LoRA} of everything in a store, all of one rank that servers accept; of nothing, one of zeros."""
    blocks, parts = store.contexts.blocks, dict[int, list[Factors]]()
    for layer, factors in store.contexts.factors.items():
        parts[layer] = [Factors(factors.left.double(), factors.right.double())]
    facts, lost = facts_in_rank(store)
    for layer, factors in facts.items():
        parts.setdefault(layer, []).append(factors)
    if not parts:
        layer = (store.layers or (0,))[0]
        width, size = blocks.shape(layer)
        parts[layer] = [Factors(torch.zeros(size, 0, dtype=torch.float64), torch.zeros(0, width, dtype=torch.float64))]
    joint = {layer: _joined(own) for layer, own in sorted(parts.items())}
    whole = {layer: _within_ranks(factors) for layer, factors in joint.items()}
    cut = [layer for layer in facts if whole[layer] is not joint[layer]]
    if cut:
        lost = _lost(store, {**facts, **{layer: whole[layer] for layer in cut}}, cut)
    rank = next(rank for rank in RANKS if rank >= max(len(one.right) for one in whole.values()))
    return {blocks.name(layer): _padded(one, rank, lost) for layer, one in whole.items()}


def _joined(parts: Sequence[Factors]) -> Factors:
    """The sum of weight deltas, rows that are zero left out."""
    left, right = torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts])
    used = (right != 0).any(1)
    return Factors(left[:, used], right[used])


def _within_ranks(factors: Factors) -> Factors:
    """The weight delta, or the nearest one of the largest rank that servers accept."""
    if len(factors.right) <= RANKS[-1]:
        return factors
    q, r = torch.linalg.qr(factors.right.T)
    left, values, right = torch.linalg.svd(factors.left @ r.T, full_matrices=False)
    kept = slice(0, RANKS[-1])
    return Factors(left[:, kept] * values[kept], right[kept] @ q.T)


def _padded(factors: Factors, rank: int, lost: tuple[str, ...] = ()) -> Lora:
    """A LoRA of a rank, in float32."""
    a = torch.zeros(rank, factors.right.shape[1], dtype=torch.float64)
    b = torch.zeros(len(factors.left), rank, dtype=torch.float64)
    a[: len(factors.right)], b[:, : len(factors.right)] = factors.right, factors.left
    # Both factors of one size: neither leaves half precision's range.
    scale = _balance(a, b)
    return Lora((a * scale[:, None]).float(), (b / scale).float(), lost)


def write_lora(store: EditStore, loras: Mapping[str, Lora], folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which plain PEFT reads."""
    base = store.contexts.blocks.base
    rank = max(lora.rank for lora in loras.values())
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(loras), fan_in_fan_out=hasattr(store.contexts.blocks.down(0), "nf"),
        bias="none", task_type="CAUSAL_LM", inference_mode=True, lora_dropout=0.0,
        base_model_name_or_path=recorded_name(getattr(base.config, "_name_or_path", None)),
    )  # fmt: skip
    config.target_modules = sorted(loras)  # PEFT makes a set of the list, and writes that in any order
    config.save_pretrained(str(folder))
    tensors: dict[str, Tensor] = {}
    for module, lora in loras.items():
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": lora.a.contiguous(), f"{name}.lora_B.weight": lora.b.contiguous()}
    write_tensors(folder / WEIGHTS, tensors)


def store_as_gguf(store: EditStore, path: Path) -> Path:
    """See `EditStore.export_gguf`."""
    check_file("export_gguf", path, ".gguf")
    write_gguf(loras_of(store), path, store.contexts.blocks.base.config)
    return path


def write_gguf(loras: Mapping[str, Lora], path: Path, config: Any) -> None:
    """Writes a LoRA as a GGUF file, for llama.cpp's --lora.

    Args:
        loras: of each projection, by its name; all of one rank.
        config: the base's own configuration.

    Raises:
        NPTError: llama.cpp has no model of this family, or no such projection in it.
    """
    names = {module: gguf_name(module, config) for module in loras}
    import gguf  # here, because it takes a second to import

    def fill(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, next(architecture for _, architecture in names.values()))
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(max(lora.rank for lora in loras.values())))
        for module, lora in loras.items():
            writer.add_tensor(f"{names[module][0]}.weight.lora_a", lora.a.contiguous().numpy())
            writer.add_tensor(f"{names[module][0]}.weight.lora_b", lora.b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_file(path, fill)


def gguf_name(module: str, config: Any) -> tuple[str, str]:
    """(the projection's name in llama.cpp, the architecture there).

    Raises:
        NPTError: see `write_gguf`.
    """
    import gguf

    text = config.get_text_config(decoder=True)
    wanted = _ARCHITECTURES.get(text.model_type, text.model_type)
    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted), None)
    plain = module.replace("model.language_model.", "model.")
    name = None if arch is None else gguf.get_tensor_name_map(arch, text.num_hidden_layers).get_name(plain)
    if name is None:
        raise NPTError(
            f"--format gguf: npt knows no place for {module} of a {text.model_type} model in llama.cpp; export it as peft, "
            "and convert that with llama.cpp's convert_lora_to_gguf.py"
        )
    return name, wanted


def read_loras(folder: Path, modules: Sequence[str]) -> dict[str, Lora]:
    """{projection: LoRA} that `write_lora` left in a folder.

    Raises:
        CheckpointError: missing or damaged.
    """
    found = {}
    try:
        tensors = load_file(folder / WEIGHTS)
        for module in modules:
            a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in ("A", "B"))
            if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
                raise CheckpointError(
                    f"store {folder}: {WEIGHTS} is no LoRA of {one_line(module, 80)}; restore it from a backup"
                )
            found[module] = Lora(a, b)
    except (SafetensorError, OSError, KeyError) as error:
        reason = one_line(error, 100)
        raise CheckpointError(
            f"store {folder}: {WEIGHTS} can't be read ({reason}); restore it from a backup"
        ) from error
    return found


def described(loras: Mapping[str, Lora]) -> dict[str, Any]:
    """The LoRA, as edits.json describes it."""
    return {
        "rank": max(lora.rank for lora in loras.values()),
        "lost": sorted({id for lora in loras.values() for id in lora.lost}),
    }
