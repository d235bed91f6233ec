"""Base models, adapters and checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tests.catalogue.entries import (
    Entry,
    Kit,
    bad_adapter,
    bad_base,
    both,
    cut,
    json_of,
    pickled,
    remove,
    sets,
    tensors,
    write,
)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ADAPTER, OPTIONS = "adapter_model.safetensors", "adapter_config.json"
BASES = [
    Entry(
        "base: a name that is nowhere",
        ("train", *sets("model.base_model_name=no-such-org/no-such-model")),
        ("model.base_model_name='no-such-org/no-such-model'", "check the name, the network"),
        script=True,
    ),
    Entry(
        "base: a name that can't be one",
        ("memory", *sets("model.base_model_name='a b/c:d'")),
        ("model.base_model_name='a b/c:d'", "check the name"),
    ),
    Entry(
        "base: a file",
        ("train", *sets("model.base_model_name=w.bin")),
        ("model.base_model_name=w.bin: is a file", "name a Hugging Face model folder"),
        {"w.bin": b"x"},
    ),
    bad_base("no config.json", remove(CONFIG), "has no config.json", "name a Hugging Face model folder"),
    bad_base(
        "a LoRA folder", both(remove(CONFIG), write(OPTIONS, b'{"peft_type": "LORA", "base_model_name_or_path": "org/m"}')),
        "base: is a LORA adapter, not a model", "name its base (it was made for org/m), or merge the adapter",
    ),
    bad_base(
        "an NPT adapter", both(remove(CONFIG), write(OPTIONS, b'{"peft_type": "NPT"}')),
        "base: is an NPT adapter, not a model", "made for unknown), and the adapter with --checkpoint",
    ),
    bad_base("an adapter of no JSON", both(remove(CONFIG), write(OPTIONS, b"{")), "is a unknown adapter, not a model"),
    bad_base(
        "a LoRA beside the weights", write(OPTIONS, b'{"peft_type": "LORA"}'),
        "holds a LORA adapter (adapter_config.json) beside the model", "move adapter_config.json", "merge_and_unload",
        script=True,
    ),
    bad_base("an NPT adapter beside the weights", write(OPTIONS, b'{"peft_type": "NPT"}'), "holds a NPT adapter", "move"),
    bad_base("config.json is no JSON", write(CONFIG, b"{rank"), "can't be loaded", "restore its config.json"),
    bad_base("config.json is an array", write(CONFIG, b"[1, 2]"), "can't be loaded", "restore its config.json"),
    bad_base("config.json is empty", write(CONFIG, b""), "can't be loaded", "restore its config.json"),
    bad_base("config.json is binary", write(CONFIG, b"\xff\0\1"), "can't be loaded", "restore its config.json"),
    bad_base("no model_type", write(CONFIG, b"{}"), "can't be loaded", "restore its config.json"),
    bad_base("an unknown model_type", json_of(CONFIG, model_type="llamma"), "llamma", "correct model_type in its config"),
    bad_base("a model_type that is none", json_of(CONFIG, model_type=7), "can't be loaded", "correct model_type"),
    bad_base("another family", json_of(CONFIG, model_type="bert"), "'bert' is not supported", "npt families lists"),
    bad_base("a size that is text", json_of(CONFIG, hidden_size="wide"), "hidden_size", "restore its config.json"),
    bad_base("no weights", remove(WEIGHTS), "model.safetensors", "restore its config.json, tokenizer and"),
    bad_base("truncated weights", cut(WEIGHTS, 5_000), "can't be loaded", "restore", script=True),
    bad_base("empty weights", write(WEIGHTS, b""), "can't be loaded", "restore"),
    bad_base("weights that are text", write(WEIGHTS, b"hello, this is no tensor"), "can't be loaded", "restore"),
    bad_base("a pickle only", both(remove(WEIGHTS), pickled("pytorch_model.bin")), "can't be loaded", "safetensors"),
    bad_base("a pickle named safetensors", pickled(WEIGHTS), "can't be loaded", "restore"),
    bad_base(
        "weights of other shapes", json_of(CONFIG, intermediate_size=48), "have another shape than config.json says",
        "restore",
    ),
    bad_base(
        "weights that are not there", json_of(CONFIG, num_hidden_layers=5), "are missing, first", "restore"
    ),
    bad_base("no tokenizer", remove("tokenizer.json", "tokenizer_config.json"), "can't be loaded", "restore"),
    bad_base("a tokenizer that is no JSON", write("tokenizer.json", b"{"), "can't be loaded", "restore"),
    bad_base("a tokenizer of nothing", write("tokenizer.json", b"{}"), "can't be loaded", "restore"),
    bad_base(
        "code of its own",
        json_of(CONFIG, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        "brings Python code of its own, which is not run", "model.trust_remote_code=true",
    ),
    bad_base(
        "an attention that is not installed", json_of(CONFIG, _attn_implementation="flash_attention_2"),
        "take '_attn_implementation' out of its config.json",
    ),
    bad_base(
        "a quantisation that is not installed", json_of(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised with gptq", "install the package for that, or name the model that they were made from",
    ),
    bad_base(
        "a pointer of Git LFS", write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"
    ),
    bad_base("GGUF beside config.json", both(remove(WEIGHTS), write("F.gguf", b"GGUF")), "name the file, "),
    bad_base("a cut GGUF alone", both(remove(CONFIG), write("F.gguf", b"GGUF")), "no whole GGUF file", "fetch it again"),
    bad_base(
        "two GGUF files", both(remove(CONFIG), both(write("F.gguf", b""), write("G.gguf", b""))), "it has 2 GGUF files",
        "name the one that is meant, such as",
    ),
    Entry(
        "base: a text that is named as GGUF",
        ("train", *sets("model.base_model_name=m/F.gguf")),
        ("m/F.gguf: is no whole GGUF file", "fetch it again"),
        {"m/F.gguf": b"a page that says: not found"},
    ),
    Entry(
        "base: the hub's cache of one",
        ("train", *sets("model.base_model_name=models--a--b")),
        ("has no config.json", "name the folder in it that has one: models--a--b/snapshots/0"),
        {"models--a--b/snapshots/0/config.json": b"{}"},
    ),
    Entry(
        "base: a block past the last",
        ("train", *sets("model.base_model_name={model}", "model.npt_layers=[99]")),
        ("npt_layers=[99]", "the model has 4 blocks", "use -4 to 3"),
    ),
    Entry(
        "base: a block before the first",
        ("memory", *sets("model.base_model_name={model}", "model.npt_layers=[-9]")),
        ("npt_layers=[-9]", "the model has 4 blocks", "use -4 to 3"),
    ),
    Entry(
        "base: one block by two names",
        ("train", *sets("model.base_model_name={model}", "model.npt_layers=[3, -1]")),
        ("npt_layers=[3, -1] names a block twice", "name each once"),
    ),
    Entry(
        "base: a rank above the hidden size",
        ("train", *sets("model.base_model_name={model}", "model.rank=25")),
        ("model.rank=25 is larger than the model's hidden size 24", "use a rank up to that"),
    ),
]  # fmt: skip


def first(values: dict[str, torch.Tensor]) -> str:
    return sorted(values)[0]


def with_nan(values: dict[str, torch.Tensor]) -> None:
    values[first(values)] = torch.full_like(values[first(values)], float("nan"))


def nameless(folder: Path, kit: Kit) -> None:
    """A copy of the adapter that names no base."""
    shutil.copytree(kit.adapter, folder / "adapter")
    json_of(OPTIONS, base_model_name_or_path=None)(folder / "adapter")


ADAPTERS = [
    Entry(
        "adapter: missing",
        ("generate", "hello"),
        ("checkpoint checkpoints/best_model: no adapter folder there", "run `npt train` first"),
        script=True,
    ),
    Entry(
        "adapter: a missing .pt",
        ("evaluate", "--checkpoint", "no/best_model.pt"),
        ("checkpoint no/best_model.pt: no adapter folder", "pickled .pt files are never read"),
    ),
    Entry(
        "adapter: a file",
        ("generate", "hello", "--checkpoint", "adapter.safetensors"),
        ("checkpoint adapter.safetensors: no adapter folder", "name a folder with adapter_config.json"),
        {"adapter.safetensors": b"x"},
    ),
    Entry(
        "adapter: the folder around one",
        ("generate", "hello", "--checkpoint", "c"),
        ("checkpoint c: adapter_config.json is missing", "name the adapter in it: c/best_model"),
        {"c/best_model/adapter_config.json": b"{}", "c/a/adapter_config.json": b"{}"},
    ),
    Entry(
        "adapter: a whole model",
        ("evaluate", "--checkpoint", "{model}"),
        ("adapter_config.json is missing", "it is a whole model: name it in model.base_model_name"),
    ),
    Entry(
        "adapter: of a base without a name",
        ("generate", "hello", "--checkpoint", "adapter"),
        ("checkpoint adapter: adapter_config.json does not say which base", "--set model.base_model_name=FOLDER_OR_HUB_ID"),
        prepare=nameless,
    ),
    Entry(
        "adapter: decoding in an unknown way",
        ("generate", "hello", "--decoding", "wild"),
        ("--decoding", "greedy", "see npt generate --help"),
    ),
    bad_adapter("no weights", remove(ADAPTER), f"{ADAPTER} is missing", "name a folder that save_pretrained wrote"),
    bad_adapter("no config", remove(OPTIONS), f"{OPTIONS} is missing", "name a folder"),
    bad_adapter("a pickle only", both(remove(ADAPTER), pickled("adapter_model.bin")), "pickled weights are never read"),
    bad_adapter("a pickle named safetensors", pickled(ADAPTER), "is damaged", "restore it from a backup", script=True),
    bad_adapter("truncated weights", cut(ADAPTER, 500), "is damaged", "restore it from a backup"),
    bad_adapter("empty weights", write(ADAPTER, b""), "is damaged", "restore it from a backup"),
    bad_adapter("NaN", tensors(ADAPTER, with_nan), "holds NaN or infinity in", "take an earlier checkpoint"),
    bad_adapter(
        "a key too many", tensors(ADAPTER, lambda v: v.update(odd=torch.ones(2))), "do not fit its config", "unknown odd"
    ),
    bad_adapter("a key too few", tensors(ADAPTER, lambda v: v.pop(first(v))), "do not fit its config", "use the base"),
    bad_adapter("no keys", tensors(ADAPTER, lambda v: v.clear()), "do not fit its config", "use the base"),
    bad_adapter(
        "weights of other shapes",
        tensors(ADAPTER, lambda v: v.update({k: torch.ones(7) for k in v})),
        "size mismatch", "use the base it was made from",
    ),
    bad_adapter("another rank", json_of(OPTIONS, rank=5), "size mismatch", "use the base it was made from"),
    bad_adapter("other blocks", json_of(OPTIONS, npt_layers=[0]), "do not fit its config", "use the base"),
    bad_adapter("config is no JSON", write(OPTIONS, b"{rank"), "is not a JSON object", "restore it from a backup"),
    bad_adapter("config is an array", write(OPTIONS, b"[]"), "is not a JSON object but list", "restore"),
    bad_adapter("config is binary", write(OPTIONS, b"\xff\0"), "is not a JSON object", "restore"),
    bad_adapter("config is deep", write(OPTIONS, b"[" * 100_000), "is not a JSON object", "restore"),
    bad_adapter("LoRA", json_of(OPTIONS, peft_type="LORA"), "it is a LORA adapter, not NPT", "load it with peft"),
    bad_adapter("a method that is none", json_of(OPTIONS, peft_type=["NPT"]), "['NPT'] adapter, not NPT"),
    bad_adapter("no method", json_of(OPTIONS, peft_type=...), "None adapter, not NPT"),
    bad_adapter("an unknown gain", json_of(OPTIONS, gain="loud"), "gain: \"loud\": use 'none', 'norm'", "restore"),
    bad_adapter("an absurd rank", json_of(OPTIONS, rank=10**9), "rank=1000000000 is larger than", "use a rank up to"),
    bad_adapter("a rank that is text", json_of(OPTIONS, rank="16"), 'rank: "16": use a whole number', "restore"),
    bad_adapter("a scale that is NaN", json_of(OPTIONS, modulation_scale=float("nan")), "NaN: use a finite number"),
    bad_adapter("projections that are none", json_of(OPTIONS, target_projections=3), "3: use a list", "restore"),
    bad_adapter("layers that are none", json_of(OPTIONS, npt_layers={"a": 1}), "npt_layers", "use upper_half"),
    bad_adapter("a block past the last", json_of(OPTIONS, npt_layers=[99]), "npt_layers=[99]", "use -4 to 3"),
    bad_adapter("a base of no size", json_of(OPTIONS, base_shape=[1]), "base_shape: [1]: use three whole numbers"),
    bad_adapter(
        "a base of other sizes", json_of(OPTIONS, base_shape=[32, 40, 4]),
        "made for a base with hidden size 32, intermediate size 40, 4 blocks", "Load it on",
    ),
    bad_adapter(
        "a base of fewer blocks", json_of(OPTIONS, base_shape=[24, 40, 2]), "2 blocks; this one has", "Load it on"
    ),
    bad_adapter("a base's name that is none", json_of(OPTIONS, base_model_name_or_path=3), "use text", "restore"),
    bad_adapter("a newer format", json_of(OPTIONS, format_version=99), "format_version=99", "install the npt that wrote it"),
    bad_adapter("a format that is text", json_of(OPTIONS, format_version="new"), "format_version: new: use a whole"),
    bad_adapter("a fingerprint that is none", json_of(OPTIONS, base_fingerprint=3), "base_fingerprint", "restore"),
    bad_adapter(
        "a fingerprint cut short", json_of(OPTIONS, base_fingerprint={"sample": {"embedding": [1.0]}}),
        "base_fingerprint", "restore it from a backup",
    ),
    bad_adapter(
        "another base of the same sizes", json_of(OPTIONS, base_fingerprint={"config": {"vocab_size": 7}}),
        "made for another base: vocab_size is", "Load it on",
    ),
    bad_adapter(
        "a fingerprint whose samples are none", json_of(OPTIONS, base_fingerprint={"samples": "abc"}),
        "base_fingerprint", "restore it from a backup",
    ),
    bad_adapter(
        "another rotary embedding", json_of(OPTIONS, base_fingerprint={"config": {"rope_parameters": {"rope_theta": 5}}}),
        "made for another base: rope_parameters is", "Load it on",
    ),
    bad_adapter(
        "another adapter inside its base",
        json_of(OPTIONS, base_fingerprint={"inside": {"kinds": ["lora"], "layers": "", "weights": "", "settings": {},
                                                      "samples": {"names": "", "values": ""}}}),
        "other adapters are at work inside it: none here, lora there", "Load the other adapters first",
    ),
    bad_adapter(
        "another vocabulary", json_of(OPTIONS, base_fingerprint={"config": {"vocab_size": 7}}),
        "vocab_size is", "Load it on", "after model.resize_token_embeddings(7)",
    ),
    bad_adapter(
        "a block renamed", tensors(ADAPTER, lambda v: v.update({k.replace(".3.", ".9."): v.pop(k) for k in list(v)})),
        "do not fit its config or this base: missing", "unknown", "use the base it was made from",
    ),
    Entry(
        "resume: nothing",
        ("train", "--resume"),
        ("paths.checkpoint_dir=checkpoints holds no checkpoint to resume", "run without --resume"),
    ),
    Entry(
        "resume: an empty folder",
        ("train", "--resume", *sets("paths.checkpoint_dir=c")),
        ("paths.checkpoint_dir=c holds no checkpoint", "run without --resume"),
        {"c/note.txt": b""},
    ),
]  # fmt: skip
