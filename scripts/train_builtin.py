"""Trains `builtin:tiny`, the Llama-architecture model in the package: corpus, tokenizer, weights and model card.

    python scripts/train_builtin.py --teacher TEACHER --prose FILE.txt ... --out src/npt/builtin/tiny

TEACHER is a causal LM that writes short stories, as a Hugging Face folder or hub id. Everything is drawn from --seed: the
same arguments on the same machine and libraries give the same weights, bit for bit. Stopped, it goes on where it was.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import datasets
import tokenizers
import torch
import transformers
import typer
from rich.progress import track
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from npt.data import pack
from npt.data.batches import batches_of, scored_positions
from npt.data.sampling import preallocated_cache
from npt.tuner.converted import device_of

CONTEXT = 512
VOCABULARY = 2048
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
#: The first tokens of a story are drawn at temperature 1, so that stories differ; the rest cooler, so that they hold together.
OPENING, TEMPERATURE = 24, 0.6
#: One document in so many is held out, of every source.
HELD_OUT = 50
#: Folders of the standard library whose docstrings are left out: tests, other people's code, and the evaluation text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data", "idlelib", "ensurepip", "encodings"}


@torch.inference_mode()
def write_stories(model: Any, tokenizer: Any, seed: int, count: int) -> list[str]:
    """The stories among `count` samples of the model that end within its context."""
    generator = torch.Generator().manual_seed(seed)
    bos = tokenizer.bos_token_id
    ends = torch.tensor([bos, tokenizer.eos_token_id])
    limit = min(CONTEXT, model.config.max_position_embeddings)
    ids = torch.full((count, limit), bos)
    rows, length = torch.arange(count), torch.zeros(count, dtype=torch.long)
    cache = preallocated_cache(model, limit)
    for position in range(1, limit):
        logits = model(input_ids=ids[rows, position - 1, None], past_key_values=cache, use_cache=True).logits[:, -1]
        temperature = 1.0 if position <= OPENING else TEMPERATURE
        ids[rows, position] = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[
            :, 0
        ]
        ended = torch.isin(ids[rows, position], ends)
        length[rows[ended & (length[rows] == 0)]] = position
        if position % 32 == 0:  # finished rows leave the batch
            going = (length[rows] == 0).nonzero()[:, 0]
            rows = rows[going]
            cache.batch_select_indices(going)
        if len(rows) == 0:
            break
    return [tokenizer.decode(row[1:n]).strip() for row, n in zip(ids, length, strict=True) if n > 0]


def stories(teacher: str, seed: int, megabytes: float, batch_size: int, work: Path) -> list[str]:
    """Different stories by the teacher, of 200 or more plain characters; kept batch by batch in `work`."""
    path = work / "stories.jsonl"
    kept = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    texts = {text: None for batch in kept for text in batch}
    size = sum(map(len, texts))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    batch = len(kept)
    with path.open("a", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            drawn = write_stories(model, tokenizer, seed * 1_000_003 + batch, batch_size)
            new = [text for text in drawn if len(text) >= 200 and text.isascii() and text not in texts]
            texts |= dict.fromkeys(new)
            size += sum(map(len, new))
            file.write(json.dumps(new) + "\n")
            file.flush()
            batch += 1
            print(f"stories: {len(texts):,}, {size / 1e6:.1f} of {megabytes} MB", flush=True)
    return list(texts)


def docstrings() -> list[str]:
    """The standard library's own docstrings, one document a module; tests and `pydoc_data` left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in track(sorted(root.rglob("*.py")), "docstrings"):
        if LEFT_OUT & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and deliberately broken files
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(text for text in found if text)
        if text.isascii() and len(text) >= 200:
            documents.append(text)
    return documents


def paragraphs(path: Path, size: int = 3000) -> list[str]:
    """A book in pieces of about `size` characters, cut between paragraphs, its line breaks joined."""
    pieces, piece = [], ""
    for paragraph in path.read_text("utf-8").replace("\r\n", "\n").split("\n\n"):
        piece += " ".join(paragraph.split()) + "\n"
        if len(piece) >= size:
            pieces.append(piece.strip())
            piece = ""
    return [p for p in [*pieces, piece.strip()] if p]


def train_tokenizer(texts: Iterator[str]) -> Any:
    """Byte-level BPE: any text encodes, digits one by one, <s> in front."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents)."""
    held_out = list(documents[::HELD_OUT])
    return [text for i, text in enumerate(documents) if i % HELD_OUT], held_out


def train(tokenizer: Any, blocks: datasets.Dataset, steps: int, batch: int, seed: int, work: Path) -> LlamaForCausalLM:
    """The weights after `steps` of AdamW with a cosine schedule, `batch` blocks each; resumes from `work`."""
    transformers.set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **ARCHITECTURE,
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype=torch.float32,
        )
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,  # autocast: the weights and the optimizer's state stay in float32
        optim="adamw_torch_fused",
        logging_steps=min(50, steps),
        save_steps=250,
        save_total_limit=2,
        seed=seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=blocks)
    trainer.train(resume_from_checkpoint=transformers.trainer_utils.get_last_checkpoint(str(work / "trainer")))
    return model.eval()


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, documents: Sequence[str]) -> tuple[float, float, int]:
    """(perplexity per token, bits per character, tokens) over all text, in blocks of the context."""
    blocks = pack(documents, tokenizer, CONTEXT, keep_remainder=True)
    total, count = 0.0, 0
    for rows in batches_of(blocks, 8, device_of(model)):
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.float()
        targets = rows["labels"][:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        count += int(scored_positions(rows["labels"]).sum())
    return math.exp(total / count), total / sum(map(len, documents)) / math.log(2), count


def save(model: Any, tokenizer: Any, out: Path) -> str:
    """Writes weights (bfloat16), config and tokenizer; returns the weights' SHA-256."""
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.config.use_cache = True  # Trainer switches it off
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The config still says float32: half the size on disk, computed exactly as stored where bfloat16 is slow.
    file = out / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def samples(model: Any, tokenizer: Any, seed: int, count: int = 5) -> list[str]:
    """The first `count` samples at temperature 0.7, whatever they are."""
    torch.manual_seed(seed)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, temperature=0.7, top_k=0, max_new_tokens=220
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


CARD = """---
language: en
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# builtin:tiny

A Llama-architecture causal LM of {parameters:,} parameters that comes with `npt`, so that a first run needs no download. It
writes simple children's stories in readable English, with the logic of a model of its size. It knows nothing and follows no
instructions; use it to try the code.

| | |
|---|---|
| hidden size, blocks, heads, MLP | {hidden_size}, {num_hidden_layers}, {num_attention_heads}, {intermediate_size} |
| vocabulary | {vocabulary:,}, byte-level BPE trained on the same text |
| context | {context} tokens |
| weights | `model.safetensors`, bfloat16, {bytes:,} bytes; computed in float32 |
| SHA-256 of the weights | `{sha256}` |

## Training

Made by `scripts/train_builtin.py`, seed {seed}: {steps:,} steps of {batch_tokens:,} tokens ({epochs:.1f} passes), AdamW,
cosine from 3e-3, bfloat16 autocast, from {megabytes:.0f} MB of stories and the real text below.
Python {python}, torch {torch}, transformers {transformers}, {processor}.

| source | documents | characters | held-out perplexity per token | bits per character |
|---|---|---|---|---|
{sources}

One document in {held_out} of every source is held out. Python's language reference (`pydoc_data.topics`, the data set
`builtin:python-docs`) is in no training text. Stories are sampled from the teacher, the first {opening} tokens at temperature
1, then {temperature}.

Sources: `stories260k` by Andrej Karpathy (MIT licence), trained on TinyStories (Eldan and Li, arXiv 2305.07759); docstrings of
Python's standard library (PSF licence); the books are in the public domain.

## Samples

The first five at temperature 0.7, not chosen and not edited.

{samples}
"""


def write_card(
    model: Any, tokenizer: Any, corpora: dict[str, list[str]], held_out: dict[str, list[str]], **facts: Any
) -> str:
    """The model card: `facts` of the training, figures on held-out text, and the first samples."""
    rows = []
    for name, documents in corpora.items():
        value, bits, count = perplexity(model, tokenizer, held_out[name])
        size = sum(map(len, documents))
        rows.append(f"| {name} | {len(documents):,} | {size:,} | {value:.2f} ({count:,} tokens) | {bits:.3f} |")
    texts = samples(model, tokenizer, facts["seed"])
    return CARD.format(
        **ARCHITECTURE,
        **facts,
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=len(tokenizer),
        context=CONTEXT,
        held_out=HELD_OUT,
        opening=OPENING,
        temperature=TEMPERATURE,
        sources="\n".join(rows),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        processor=f"{torch.get_num_threads()} CPU threads",
        samples="\n\n".join("> " + text.strip().replace("\n", "\n> ") for text in texts),
    )


def main(
    teacher: Annotated[str, typer.Option(help="Causal LM that writes stories: a folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Where weights, tokenizer and card go.")],
    prose: Annotated[list[Path] | None, typer.Option(help="Plain text of a book; repeat for more.")] = None,
    megabytes: Annotated[float, typer.Option(help="Characters of stories, in millions.")] = 25.0,
    story_batch: Annotated[int, typer.Option(help="Stories drawn side by side, each batch with its own seed.")] = 192,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Blocks of 512 tokens in a step.")] = 16,
    seed: Annotated[int, typer.Option()] = 0,
    work: Annotated[Path, typer.Option(help="Keeps stories and checkpoints between runs.")] = Path("builtin_work"),
    stories_only: Annotated[bool, typer.Option(help="Stop once the stories are written.")] = False,
) -> None:
    """Trains the model that is shipped with the package."""
    work.mkdir(parents=True, exist_ok=True)
    corpora = {"stories by the teacher": stories(teacher, seed, megabytes, story_batch, work)}
    if stories_only:
        return
    corpora["docstrings of the standard library"] = docstrings()
    corpora |= {path.stem: paragraphs(path) for path in prose or []}
    parts = {name: split(documents) for name, documents in corpora.items()}
    own, *real = (train_part for train_part, _ in parts.values())
    texts = datasets.Dataset.from_dict({"text": own + [t for part in real for t in part]}).shuffle(seed=seed)
    tokenizer = train_tokenizer(iter(texts["text"]))
    blocks = pack(texts["text"], tokenizer, CONTEXT, progress=True)
    print(f"{len(texts)} documents, {len(blocks)} blocks of {CONTEXT} tokens", flush=True)
    model = train(tokenizer, blocks, steps, batch, seed, work)
    out.mkdir(parents=True, exist_ok=True)
    digest = save(model, tokenizer, out)
    shipped = AutoModelForCausalLM.from_pretrained(out)  # what the figures are about
    card = write_card(
        shipped, tokenizer, corpora, {name: held_out for name, (_, held_out) in parts.items()},
        seed=seed, steps=steps, batch_tokens=batch * CONTEXT, epochs=steps * batch / len(blocks), megabytes=megabytes,
        bytes=(out / "model.safetensors").stat().st_size, sha256=digest,
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    typer.run(main)
