"""Small models that know a FactWorld: trained in minutes on a CPU, kept in the cache, and void unless they pass the gates."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from npt.common.kept import SOURCE, keep
from npt.common.progress import progress_bar
from npt.editing.benchmark.continuing import continued_many
from npt.editing.benchmark.muon import Muon
from npt.editing.benchmark.wording import COUNTRY_OF_PERSON, NEWS, RELATIONS, Relation
from npt.editing.benchmark.world import Document, Person, Size, World, stated
from npt.editing.measure import follows
from npt.errors import NPTError, RunError

FAMILIES = ("llama", "gpt2")
#: Documents that are sorted by length together; more need less padding and mix less.
_POOL = 200
#: Tokens behind a prompt that hold every object and the full stop behind it.
ANSWER = 5


@dataclass(frozen=True)
class Recipe:
    """A small model and its training, all of which goes into its name in the cache.

    seed: of the world, the weights and the order of documents. hidden, inner, blocks, heads: the architecture. context: the
    model's positions. start, embedding: standard deviations of the first weights, of matrices and of embeddings. tokens: of a
    batch. beside: weight in the loss of tokens that are no answers. few: people that the first documents are about; they
    become all people, by a constant factor a document, from `small` to `whole` of all steps. rate: of Muon, on the matrices
    of blocks; other_rate: of AdamW, on all else. Both rise over `warmup` steps and fall to zero from `hold` of all steps on.
    """

    family: str = "llama"
    seed: int = 0
    size: Size = field(default_factory=Size)
    hidden: int = 128
    inner: int = 512
    blocks: int = 4
    heads: int = 4
    start: float = 0.06
    embedding: float = 0.3
    steps: int = 2400
    tokens: int = 1024
    context: int = 256
    beside: float = 0.05
    few: int = 48
    small: float = 0.12
    whole: float = 0.4
    rate: float = 0.01
    other_rate: float = 6e-3
    warmup: int = 40
    hold: float = 0.5

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise NPTError(f"model={self.family!r}: use one of {', '.join(FAMILIES)}")
        if self.steps < 1:
            raise NPTError(f"steps={self.steps}: use a whole number from 1")

    def world(self) -> World:
        """The world that the model knows."""
        return World(self.seed, self.size)

    def people(self) -> Iterator[int]:
        """How many people documents are about, document by document, until it is all of them."""
        documents = self.steps * self.tokens / 40  # tokens of a document, about
        for number in count():
            share = (number / documents - self.small) / (self.whole - self.small)
            if share >= 1:
                return
            yield round(self.few * (self.size.people / self.few) ** max(0.0, share))


@dataclass(frozen=True)
class Gates:
    """Shares of right generated answers before any edit.

    recall: facts, behind trained wordings. held_out: behind the held-out wording; reported, no gate. override: what news in
    front says instead, in another wording. two_hop: the country of the city that news in front names.
    """

    recall: float
    held_out: float
    override: float
    two_hop: float

    def check(self, name: str) -> None:
        """Checks that the model is one on which edits mean something.

        Raises:
            RunError: a figure is below its gate.
        """
        low = [
            f"{key} {getattr(self, key):.1%} (needs {gate:.0%})"
            for key, gate in GATES.items()
            if getattr(self, key) < gate
        ]
        if low:
            raise RunError(
                f"{name}: the run is void, the model does not know its world: {', '.join(low)}; train it for more steps"
            )


GATES = {"recall": 0.99, "override": 0.95, "two_hop": 0.90}


def small_model(
    recipe: Recipe, *, cache_dir: str | Path | None = None, progress: bool = True
) -> tuple[Any, Any, World]:
    """(model, tokenizer, world) of a recipe, from the cache or trained now; the gates are not asked.

    Args:
        recipe: see `Recipe`. The same one gives the same weights on one machine with one number of threads.
        cache_dir: the folder to keep it in; None for npt's own (see `npt.common.kept`).
        progress: show progress bars.

    Raises:
        NPTError: the cache can't be written to. RunError: its disk is full.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world = recipe.world()
    record = {SOURCE: f"FactWorld, {recipe.family}, seed {recipe.seed}", **asdict(recipe), "text": digest_of(world)}
    mark = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]

    def fill(folder: Path) -> None:
        model, tokenizer = trained(recipe, world, progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    name = f"factworld-{recipe.family}-{recipe.seed}-{mark}"
    folder = keep(name, json.loads(json.dumps(record)), fill, needed=32 * 2**20, cache_dir=cache_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), world


def digest_of(world: World) -> str:
    """A digest of the people and of some documents: another generator gives another one."""
    documents = world.documents(0)
    parts = [*map(repr, world.people), *(repr(next(documents)) for _ in range(400))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# -- training --------------------------------------------------------------------------------------------------------------


def untrained(recipe: Recipe, tokenizer: Any) -> Any:
    """The model of a recipe with its first weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # Apart from the head, embeddings can be so long that a token is still told from others behind the first blocks.
    ends |= {"initializer_range": recipe.start, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.family == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.inner,
                num_hidden_layers=recipe.blocks, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
                max_position_embeddings=recipe.context, **ends,
            ))  # fmt: skip
        else:
            model = GPT2LMHeadModel(GPT2Config(
                vocab_size=len(tokenizer), n_embd=recipe.hidden, n_inner=recipe.inner, n_layer=recipe.blocks,
                n_head=recipe.heads, n_positions=recipe.context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ends,
            ))  # fmt: skip
        embeddings = model.get_input_embeddings().weight
        torch.nn.init.normal_(embeddings, std=recipe.embedding)
        with torch.no_grad():  # one map copies every token then, which overriding a fact needs
            model.get_output_embeddings().weight.copy_(embeddings * (recipe.start / recipe.embedding))
    return model


def trained(recipe: Recipe, world: World, progress: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer): next-token cross-entropy on documents, without a validation: the gates are that."""
    tokenizer = world.tokenizer()
    model = untrained(recipe, tokenizer).train()
    # Matrices inside the blocks; embeddings, norms and biases are AdamW's.
    inside = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
    ]
    known = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(inside, recipe.rate),
        torch.optim.AdamW(others, recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = (recipe.rate, recipe.other_rate)
    batches = batches_of(world.documents(recipe.seed, few=recipe.people()), tokenizer, recipe)
    with progress_bar(
        f"Training FactWorld ({recipe.family}, seed {recipe.seed})", recipe.steps, progress, unit="steps"
    ) as advance:
        for step in range(recipe.steps):
            share = min(1.0, (step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.steps * (1 - recipe.hold)))
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * share
            loss = loss_of(model, *next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            advance(1)
    return model.eval(), tokenizer


def loss_of(model: Any, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the next tokens' cross-entropy in nats, of rows (rows, tokens)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (each * weights).sum() / weights.sum()


def batches_of(documents: Iterator[Document], tokenizer: Any, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: (token ids, weights in the loss), each (rows, tokens), of about `recipe.tokens` tokens.

    A row is one document from BOS on, as a question will be; documents that share a row would read each other's objects. Those
    of a batch are about equally long, and padding behind them has weight 0.
    """
    draw = random.Random(recipe.seed)
    while True:
        pool = sorted(_encoded(list(islice(documents, _POOL)), tokenizer, recipe.beside), key=lambda one: len(one[0]))
        parts, part, tokens = list[list[tuple[list[int], list[float]]]](), list[tuple[list[int], list[float]]](), 0
        for one in pool:
            part.append(one)
            tokens += len(one[0])
            if tokens >= recipe.tokens:
                parts, part, tokens = [*parts, part], [], 0
        if part and tokens < recipe.tokens // 2 and parts:
            parts[-1] += part
        elif part:
            parts.append(part)
        for part in draw.sample(parts, len(parts)):
            shape = len(part), len(part[-1][0])
            ids, weights = torch.full(shape, tokenizer.pad_token_id), torch.zeros(shape)
            for i, (row, shares) in enumerate(part):
                ids[i, : len(row)], weights[i, : len(row)] = torch.tensor(row), torch.tensor(shares)
            yield ids, weights


def _encoded(documents: Sequence[Document], tokenizer: Any, beside: float) -> list[tuple[list[int], list[float]]]:
    """(token ids, weights) of each document: 1 for tokens of answers, `beside` for all others."""
    found = tokenizer([document.text for document in documents], return_offsets_mapping=True)
    rows = []
    for document, ids, offsets in zip(documents, found["input_ids"], found["offset_mapping"], strict=True):
        ends = [end if end > begin else -1 for begin, end in offsets]
        rows.append((ids, [1.0 if any(a < end <= b for a, b in document.answers) else beside for end in ends]))
    return rows


# -- gates -----------------------------------------------------------------------------------------------------------------


def gates_of(
    model: Any, tokenizer: Any, world: World, seed: int = 0, asked: int = 1000, progress: bool = True
) -> Gates:
    """The gates' figures, each on so many drawn questions."""
    draw = random.Random(f"gates {world.seed} {seed}")
    people = world.of("editable", "visible", "neighbour")
    asks = {
        "recall": lambda p, r: (draw.choice(r.trained).format(p.name), p.facts[r.name]),
        "held_out": lambda p, r: (r.held_out.format(p.name), p.facts[r.name]),
        "override": lambda p, r: _overridden(draw, world, p, r),
        "two_hop": lambda p, r: _hopped(draw, world, p),
    }
    shares = {}
    for name, ask in asks.items():
        questions = [ask(draw.choice(people), draw.choice(RELATIONS)) for _ in range(asked)]
        shares[name] = _right(model, tokenizer, questions, name, progress)
    return Gates(**shares)


def _right(model: Any, tokenizer: Any, asked: Sequence[tuple[str, str]], name: str, progress: bool) -> float:
    """Share of (prompt, answer) whose answer is written behind the prompt."""
    texts = continued_many(model, tokenizer, [prompt for prompt, _ in asked], ANSWER, f"Gate {name}", progress)
    return sum(follows(text, answer) for text, (_, answer) in zip(texts, asked, strict=True)) / len(asked)


def _overridden(draw: random.Random, world: World, person: Person, relation: Relation) -> tuple[str, str]:
    """News about a person, and the question in another wording."""
    new = world.other(draw, person, relation.name)
    told, asked = draw.sample(relation.trained, 2)
    return f"{NEWS} {stated(told, person.name, new)} {asked.format(person.name)}", new


def _hopped(draw: random.Random, world: World, person: Person) -> tuple[str, str]:
    """News about a person's city, and the question after the country."""
    city = world.other(draw, person, "city")
    told = stated(draw.choice(RELATIONS[0].trained), person.name, city)
    return f"{NEWS} {told} {draw.choice(COUNTRY_OF_PERSON).format(person.name)}", world.country[city]
