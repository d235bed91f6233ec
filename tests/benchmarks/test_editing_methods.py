"""ROME, MEMIT, AlphaEdit, UltraEdit and fine-tuning against their published formulas, written out plainly.

The reference runs the whole model one text at a time in float64, adds what it tries with its own hooks, writes into a copy's
weights and solves with full inverses. It shares tokenisation with the methods and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

from benchmarks.editing.closed_form import AlphaEdit, Memit, Rome, Running, UltraEdit
from benchmarks.editing.finetuning import FineTuning
from npt.editing.benchmark.methods import Context, Method, Setup, Store
from npt.editing.keys import Prompts
from npt.editing.metrics import Source
from npt.editing.requests import Request
from npt.errors import NPTError
from tests.helpers import random_base, spelling_tokenizer

LAYERS = (1, 2)
REQUESTS = [
    Request("the home of Ada is", "Oslo", "Ada"),
    Request("the work of Ben Bo is", "art", "Ben Bo"),
    Request("a river of Cam is", "old", "Cam"),
]
CONTEXTS = ["", "It was so. ", "Now then, again. "]
TEXTS = [
    "the quick brown fox jumps over the lazy dog; 3 x 4 = 12? Yes!",
    "PACK MY BOX WITH FIVE DOZEN (liquor) jugs: 67890.",
]
#: Few steps, of which none meets the clamp; another test does.
STEPS: dict[str, Any] = {"steps": 6, "rate": 0.3, "clamp": 1e3}
TOLERANCE = 1e-6


@pytest.fixture
def setup() -> Setup:
    """A random GPT-2 in float64, with prefixes that are given."""
    model, tokenizer = random_base("gpt2"), spelling_tokenizer()
    source = Source(model, tokenizer, "text", TEXTS, None, None, False)
    found = Setup(model, tokenizer, source, LAYERS, epsilon=1e-3)
    found.contexts = list(CONTEXTS)
    return found


# -- the plain reference ---------------------------------------------------------------------------------------------------


@dataclass
class Plain:
    """A GPT-2 whose weights are written to."""

    model: Any
    prompts: Prompts

    def block(self, layer: int) -> Any:
        return self.model.transformer.h[layer]

    def run(self, ids: Sequence[int], module: Any = None, add: Any = None) -> tuple[Tensor, dict[Any, Any]]:
        """(logits (tokens, vocabulary), what modules saw), with `add` joined to a module's output."""
        seen: dict[Any, Any] = {}
        handles = []
        for layer, block in enumerate(self.model.transformer.h):
            projection = block.mlp.c_proj
            handles.append(
                projection.register_forward_pre_hook(lambda m, a, i=layer: seen.__setitem__(("key", i), a[0][0]))
            )
            handles.append(
                projection.register_forward_hook(lambda m, a, o, i=layer: seen.__setitem__(("mlp", i), o[0]))
            )
            handles.append(
                block.register_forward_hook(lambda m, a, o, i=layer: seen.__setitem__(("block", i), first(o)[0]))
            )
        if module is not None:
            handles.append(module.register_forward_hook(lambda m, a, o: plus(o, add)))
        try:
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen

    def place(self, request: Request, context: str = "") -> tuple[list[int], int]:
        found = self.prompts.place(request.prompt, request.subject, context)
        return list(found.ids), found.position

    def at(self, what: str, layer: int, request: Request, context: str = "") -> Tensor:
        ids, position = self.place(request, context)
        with torch.no_grad():
            return self.run(ids)[1][what, layer][position].clone()

    def key(self, layer: int, request: Request) -> Tensor:
        return torch.stack([self.at("key", layer, request, context) for context in CONTEXTS]).mean(0)

    def write(self, layer: int, delta: Tensor) -> None:
        with torch.no_grad():
            self.block(layer).mlp.c_proj.weight += delta.T

    def moment(self, layer: int) -> Tensor:
        with torch.no_grad():
            inputs = torch.cat([self.run(self.prompts.ids(text))[1]["key", layer] for text in TEXTS])
        return (inputs.T @ inputs / len(inputs)).float().double()  # statistics are kept in float32

    def best(self, request: Request, layer: int, what: str, clamp: float = 1e3, decay: float = 0.5) -> Tensor:
        """delta of equation 4 of ROME, at the output of the projection or of the block."""
        module = self.block(layer).mlp.c_proj if what == "mlp" else self.block(layer)
        length = self.at(what, layer, request).norm()
        essence = self.prompts.place(f"{request.subject} is a", request.subject, first=True)
        with torch.no_grad():
            before = self.run(essence.ids)[0][-1].log_softmax(-1)
        delta = torch.zeros(24, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=STEPS["rate"])
        for _ in range(STEPS["steps"] - 1):
            losses = []
            for context in CONTEXTS:
                start, position = self.place(request, context)
                ids = self.prompts.target(context + request.prompt, request.target, None).ids
                logits = self.run(ids, module, spot(delta, position, len(ids)))[0].log_softmax(-1)
                losses += [-logits[t - 1, ids[t]] for t in range(len(start), len(ids))]
            now = self.run(essence.ids, module, spot(delta, essence.position, len(essence.ids)))[0][-1].log_softmax(-1)
            loss = (
                torch.stack(losses).mean()
                + 0.0625 * (before.exp() * (before - now)).sum()
                + decay * delta.norm() / length**2
            )
            optimizer.zero_grad()
            delta.grad = torch.autograd.grad(loss, delta)[0].nan_to_num()
            optimizer.step()
            with torch.no_grad():
                if delta.norm() > clamp * length:
                    delta *= clamp * length / delta.norm()
        return delta.detach()


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def plus(output: Any, add: Tensor) -> Any:
    return (output[0] + add, *output[1:]) if isinstance(output, tuple) else output + add


def spot(delta: Tensor, position: int, tokens: int) -> Tensor:
    """delta at one token, (1, tokens, d)."""
    return torch.nn.functional.one_hot(torch.tensor(position), tokens).double()[None, :, None] * delta


def regular(c: Tensor) -> Tensor:
    return c + 1e-3 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error."""
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def plain(setup: Setup) -> Plain:
    model = copy.deepcopy(setup.model)
    return Plain(model, Prompts(setup.tokenizer, model.config, 96))


# -- closed forms ----------------------------------------------------------------------------------------------------------


def test_rome_one_edit_after_the_other(setup: Setup, plain: Plain) -> None:
    u_of = torch.linalg.inv(regular(plain.moment(2)))
    total = torch.zeros(24, 96, dtype=torch.float64)
    for request in REQUESTS[:2]:
        delta, u = plain.best(request, 2, "mlp"), u_of @ plain.key(2, request)
        step = torch.outer(delta, u) / (plain.at("key", 2, request) @ u)
        plain.write(2, step)
        total += step
    method = Rome(setup, **STEPS)
    method.write_many(REQUESTS[:2])
    assert off(method.deltas.of(2), total) < TOLERANCE


def test_rome_without_prefixes_is_equation_2(setup: Setup, plain: Plain) -> None:
    """W + Lambda (C^-1 k)^T with Lambda = (v - W k) / ((C^-1 k)^T k)."""
    setup.contexts = [""]
    (request,) = REQUESTS[:1]
    k, w = plain.at("key", 2, request), plain.block(2).mlp.c_proj.weight.T.detach()
    method = Rome(setup, **STEPS)
    method.write_many([request])
    found = method.deltas.of(2)
    v = (w + found) @ k
    u = torch.linalg.inv(regular(plain.moment(2))) @ k
    assert off(found, torch.outer((v - w @ k) / (u @ k), u)) < TOLERANCE and found.norm() > 1e-3


def test_the_clamp_is_relative_to_what_is_edited(setup: Setup, plain: Plain) -> None:
    (request,) = REQUESTS[:1]
    for layers, kind, what in ((LAYERS, Rome, "mlp"), ((2,), Memit, "block")):
        setup.layers = layers
        method = kind(setup, **{**STEPS, "clamp": 0.01})
        with method.at(2) as bench:
            length = float(plain.at(what, 2, request).norm())
            value = method.best_output(bench, request, method.settings, None if what == "mlp" else length)
        assert float(value.norm()) == pytest.approx(0.01 * length)
        assert off(value, plain.best(request, 2, what, clamp=0.01)) < TOLERANCE


def spread(
    plain: Plain, step: Callable[[int, Tensor, Tensor], Tensor], requests: Sequence[Request]
) -> dict[int, Tensor]:
    """MEMIT's algorithm 1: residuals at the last block, spread over the blocks, each edited before the next."""
    goals = [plain.at("block", LAYERS[-1], r) + plain.best(r, LAYERS[-1], "block") for r in requests]
    found = {}
    for number, layer in enumerate(LAYERS):
        now = [plain.at("block", LAYERS[-1], r) for r in requests]
        residual = torch.stack([g - n for g, n in zip(goals, now, strict=True)], 1) / (len(LAYERS) - number)
        keys = torch.stack([plain.key(layer, r) for r in requests], 1)
        found[layer] = step(layer, keys, residual)
        plain.write(layer, found[layer])
    return found


def test_memit_over_two_blocks(setup: Setup, plain: Plain) -> None:
    """Equation 14: Delta = R K^T (C_0 + K K^T)^-1 with C_0 = lambda C."""
    c = {layer: 0.7 * regular(plain.moment(layer)) for layer in LAYERS}
    expected = spread(plain, lambda layer, k, r: r @ k.T @ torch.linalg.inv(c[layer] + k @ k.T), REQUESTS)
    method = Memit(setup, ridge=0.7, **STEPS)
    method.write_many(REQUESTS)
    for layer in LAYERS:
        assert off(method.deltas.of(layer), expected[layer]) < TOLERANCE


def test_alphaedit_protects_what_it_wrote_before(setup: Setup, plain: Plain) -> None:
    """Delta = R K^T P (K_p K_p^T P + K K^T P + lambda I)^-1, in two turns."""
    projector, past = {}, {layer: torch.zeros(96, 96, dtype=torch.float64) for layer in LAYERS}
    for layer in LAYERS:
        u, s, _ = torch.linalg.svd(plain.moment(layer))
        small = u[:, s < 0.05]
        assert 5 < small.shape[1] < 91
        projector[layer] = small @ small.T

    def step(layer: int, k: Tensor, r: Tensor) -> Tensor:
        p = projector[layer]
        full = past[layer] @ p + k @ k.T @ p + 0.3 * torch.eye(96, dtype=torch.float64)
        past[layer] = past[layer] + k @ k.T
        return r @ k.T @ p @ torch.linalg.inv(full)

    method = AlphaEdit(setup, threshold=0.05, ridge=0.3, **STEPS)
    total = {layer: torch.zeros(24, 96, dtype=torch.float64) for layer in LAYERS}
    for turn in (REQUESTS[:2], REQUESTS[2:]):
        for layer, delta in spread(plain, step, turn).items():
            total[layer] += delta
        method.write_many(turn)
    for layer in LAYERS:
        assert off(method.deltas.of(layer), total[layer]) < TOLERANCE


def test_alphaedit_takes_a_share_of_the_directions(setup: Setup) -> None:
    method = AlphaEdit(setup, share=0.25)
    assert {basis.shape for basis in method._bases.values()} == {(96, 24)}
    with pytest.raises(NPTError, match="threshold=1e-300: no eigenvalue of C at block 1"):
        AlphaEdit(setup, threshold=1e-300)
    with pytest.raises(NPTError, match="share=0"):
        AlphaEdit(setup, share=0.0)
    setup.source.metric = "identity"
    del setup.moments
    with pytest.raises(NPTError, match="has to know C"):
        AlphaEdit(setup)


def test_memit_refuses_a_block_that_changes_what_down_gives() -> None:
    config = GraniteConfig(
        vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, residual_multiplier=0.4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer = GraniteForCausalLM(config).double().eval(), spelling_tokenizer()
    found = Setup(model, tokenizer, Source(model, tokenizer, "text", TEXTS, None, None, False), LAYERS, prefixes=0)
    with pytest.raises(NPTError, match="MEMIT and AlphaEdit are for blocks .* granite changes it"):
        Memit(found, **STEPS).write_many(REQUESTS[:1])
    Rome(found, **STEPS).write_many(REQUESTS[:1])


def test_ultraedit_is_one_ridge_regression(setup: Setup, plain: Plain) -> None:
    method = UltraEdit(setup, rate=0.02, ridge=0.5)
    method.write_many(REQUESTS)
    for layer in LAYERS:
        keys, gradients = [], []
        for request in REQUESTS:
            row = plain.prompts.target(request.prompt, request.target, None)
            add = torch.zeros(1, len(row.ids), 24, dtype=torch.float64, requires_grad=True)
            logits, seen = plain.run(row.ids, plain.block(layer).mlp.c_proj, add)
            at = torch.arange(row.start - 1, len(row.ids) - 1)
            loss = torch.nn.functional.cross_entropy(logits[at], torch.tensor(row.targets))
            keys.append(seen["key", layer][at].detach())
            gradients.append(torch.autograd.grad(loss, add)[0][0, at])
        h, g = torch.cat(keys), torch.cat(gradients)
        h_hat, g_hat = ((x - x.mean(0)) / (x.std(0) + 1e-8) for x in (h, g))
        v = -0.02 * h_hat.square().sum(1, keepdim=True) * g_hat
        expected = torch.linalg.inv(h.T @ h + 0.5 * torch.eye(96, dtype=torch.float64)) @ h.T @ v
        assert off(method.deltas.of(layer), expected.T) < TOLERANCE


def test_ultraedits_statistics_outlive_an_undo(setup: Setup) -> None:
    """A first token alone has no deviation, so its edit is nothing; after other turns it is something.

    The tokenizer makes one unknown token of a space and a letter here, so that the target is a single token.
    """
    one, method = Request("the home of Ada begins with", "O", "Ada"), UltraEdit(setup)
    setup.tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex(r"\s*."), "isolated")
    with method.at(2) as bench:
        assert len(bench.prompts.target(one.prompt, one.target, None).targets) == 1
    changes = []
    for requests in ([one], REQUESTS, [one]):
        method.write_many(requests)
        changes.append(float(method.deltas.of(2).norm()))
        method.undo()
    assert changes[0] == 0 and changes[2] > 0


def test_running_statistics_are_those_of_everything_seen() -> None:
    x = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    running = Running()
    for part in (x[:, :1], x[:, 1:4], x[:, 4:]):
        running.update(part)
    expected = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    assert torch.allclose(running(x), expected)


# -- fine-tuning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breadth", [False, True])
def test_finetuning_is_adam_on_the_weight(setup: Setup, plain: Plain, breadth: bool) -> None:
    weight = plain.block(2).mlp.c_proj.weight
    before = weight.detach().clone()
    rounds = [REQUESTS[:2] * 3] if breadth else [REQUESTS[:1] * 3, REQUESTS[1:2] * 3]
    for order in rounds:
        optimizer = torch.optim.Adam([weight], lr=1e-2)
        for request in order:
            row = plain.prompts.target(request.prompt, request.target, None)
            logits = plain.run(row.ids)[0][row.start - 1 : -1]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.tensor(row.targets)).backward(inputs=[weight])
            optimizer.step()
    method = FineTuning(setup, rate=1e-2, steps=3, breadth=breadth)
    method.write_many(REQUESTS[:2])
    assert off(method.deltas.of(2), (weight.detach() - before).T) < TOLERANCE
    assert method.passes == 6


def test_finetuning_ends_where_the_target_is_learnt_and_keeps_to_its_limit(setup: Setup) -> None:
    method = FineTuning(setup, steps=5, enough=1e3)
    method.write_many(REQUESTS)
    assert method.passes == len(REQUESTS) and not bool(method.deltas.of(2).any())
    method.undo()
    held = FineTuning(setup, rate=3e-2, steps=3, limit=0.01)
    held.write_many(REQUESTS[1:2])
    assert float(held.deltas.of(2).abs().max()) == pytest.approx(0.01)
    with pytest.raises(NPTError, match="rows=0"):
        FineTuning(setup, rows=0)


# -- the interface ---------------------------------------------------------------------------------------------------------

MADE: dict[str, Callable[[Setup], Method]] = {
    "store": lambda setup: Store(setup, values="optimised"),
    "rome": lambda setup: Rome(setup, **STEPS),
    "memit": lambda setup: Memit(setup, ridge=1.0, **STEPS),
    "alphaedit": lambda setup: AlphaEdit(setup, **STEPS),
    "ultraedit": lambda setup: UltraEdit(setup),
    "ft-m": lambda setup: FineTuning(setup, steps=2),
}


def logits(setup: Setup) -> Tensor:
    with torch.no_grad():
        found: Tensor = setup.model(input_ids=torch.arange(3, 40)[None]).logits
    return found


@pytest.fixture
def base_logits(setup: Setup) -> Iterator[Tensor]:
    found = logits(setup)
    yield found
    assert torch.equal(logits(setup), found), "the base's weights were written to, or a hook is left"


@pytest.mark.parametrize("name", list(MADE))
def test_what_is_written_can_be_switched_off_and_undone(name: str, setup: Setup, base_logits: Tensor) -> None:
    method = MADE[name](setup)
    assert torch.equal(logits(setup), base_logits)
    for _ in range(2):
        method.write_many(REQUESTS[:2])
        once = logits(setup)
        assert not torch.equal(once, base_logits) and method.passes > 0
        with method.disabled():
            assert torch.equal(logits(setup), base_logits)
        method.write_many(REQUESTS[2:])
        assert not torch.equal(logits(setup), once)
        method.undo()
        assert torch.equal(logits(setup), base_logits)


def test_undo_forgets_what_alphaedit_protected(setup: Setup, base_logits: Tensor) -> None:
    method = AlphaEdit(setup, **STEPS)
    found = []
    for _ in range(2):
        method.write_many(REQUESTS[:1])
        found.append(method.deltas.of(2))
        method.undo()
    assert torch.equal(*found)


def test_the_context_puts_statements_in_front_until_undone(setup: Setup) -> None:
    method = Context(setup)
    method.write_many(REQUESTS[:1])
    method.write_many(REQUESTS[1:2])
    assert method.text("Who?") == "the home of Ada is Oslo. the work of Ben Bo is art. Who?"
    method.undo()
    assert method.text("Who?") == "Who?"


@pytest.mark.parametrize(
    ("layers", "message"), [((), "rising"), ((2, 1), "rising"), ((-1,), "from 0"), ((4,), "4 blocks")]
)
def test_layers_are_checked(setup: Setup, layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(NPTError, match=message):
        Setup(setup.model, setup.tokenizer, setup.source, layers)
