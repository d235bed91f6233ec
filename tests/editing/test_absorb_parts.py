"""Parts of absorbing: the formula against a dense reference, streams, questions, teachers, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npt.editing.absorbing import formula
from npt.editing.absorbing.dialogue import Dialogue, context_from
from npt.editing.absorbing.lesson import Lesson
from npt.editing.absorbing.patches import Patches
from npt.editing.absorbing.questions import Questions
from npt.editing.absorbing.reading import read_context, read_questions
from npt.editing.absorbing.settings import Options, Setting, blocks_of_choice, options_of
from npt.editing.absorbing.stream import Blocks, Stream, outputs_of
from npt.editing.absorbing.teaching import Teacher, pieces, questions_from, split
from npt.editing.answers import continued
from npt.errors import DataError, NPTError
from npt.evaluation.generation import continue_text
from tests.families import CASES
from tests.helpers import random_base, spelling_tokenizer

F, D, N = 12, 7, 30
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}]{% else %}<{{ m.role }}>{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITHOUT_SYSTEM = TEMPLATE.replace("[{{ m.content }}]", "{{ raise_exception('no system role') }}")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment() -> Tensor:
    x = random(40, F, seed=1)
    return x.T @ x / 40


def chatting(template: str = TEMPLATE) -> Any:
    tokenizer = spelling_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# -- the formula -----------------------------------------------------------------------------------------------------------


def test_the_formula_is_the_ridge_solution() -> None:
    """Against a dense least-squares problem in which text and lambda are rows of their own."""
    inputs, residuals, text = random(N, F), random(N, D, seed=2), moment()
    weights = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mu, lam = 0.7, 0.05
    a, b = formula.moments(inputs, residuals, weights)
    found = formula.solve(a, b, text, mu, lam, rank=D).delta
    root = weights.sqrt()[:, None]
    share = lam * float((root * inputs).square().sum()) / F
    rows = torch.cat([root * inputs, torch.linalg.cholesky(mu * text + share * torch.eye(F, dtype=torch.float64)).T])
    targets = torch.cat([root * residuals, torch.zeros(F, D, dtype=torch.float64)])
    assert torch.allclose(found, torch.linalg.lstsq(rows, targets).solution.T, atol=1e-10)


def test_under_a_rank_no_weight_delta_of_that_rank_is_better() -> None:
    inputs, residuals, text = random(N, F), random(N, D, seed=2), moment()
    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    a, b = formula.moments(inputs, residuals, weights)
    full = formula.ridged(a, text, 0.5, 0.01)

    def cost(delta: Tensor) -> float:
        return float(torch.trace(delta @ full @ delta.T) - 2 * torch.trace(delta @ b.T))

    found = formula.solve(a, b, text, 0.5, 0.01, rank=2)
    assert found.left.shape == (D, 2) and found.right.shape == (2, F)
    best = cost(found.delta)
    whole = formula.solve(a, b, text, 0.5, 0.01, rank=D).delta
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    assert cost(whole) < best < cost(u[:, :2] * s[:2] @ v[:2])  # the plain truncation is worse
    for seed in range(5):
        moved = (found.left + 0.05 * random(D, 2, seed=seed)) @ (found.right + 0.05 * random(2, F, seed=seed + 9))
        assert cost(moved) > best


def test_moments_of_float32_are_those_of_float64() -> None:
    inputs, residuals, weights = random(N, F), random(N, D, seed=2), torch.full((N,), 1 / N, dtype=torch.float64)
    for one, other in zip(
        formula.moments(inputs.float(), residuals.float(), weights),
        formula.moments(inputs, residuals, weights),
        strict=True,
    ):
        assert one.dtype == torch.float64 and torch.allclose(one, other, atol=1e-6)


# -- streams ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2", "granite"])
def test_a_stream_gives_what_the_whole_model_gives(family: str) -> None:
    base = next(case for case in CASES if case.model_type == family).build(torch.float32)
    blocks, rows = Blocks(base), [[5, 6, 7], [8, 9, 10, 11, 12]]
    stream = Stream(blocks, rows, [2, 3])
    seen: dict[str, Tensor] = {}
    handle = blocks.down(2).register_forward_pre_hook(lambda module, args: seen.__setitem__("i", args[0].detach()))
    with torch.no_grad():
        outputs = [base.get_decoder()(torch.tensor([row])).last_hidden_state[0] for row in rows]
        inputs = seen["i"].reshape(len(rows[1]), -1)
    handle.remove()
    stream.through(1)
    passed = stream.through(2)
    assert torch.allclose(passed.inputs[2:], inputs[-3:], atol=1e-5)
    assert torch.allclose(stream.finish(), torch.cat([outputs[0][-2:], outputs[1][-3:]]), atol=1e-4)
    with pytest.raises(RuntimeError, match="block 1 is below block 2, which the rows are at"):
        stream.through(1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2", "granite", "bloom", "qwen3_5_text"])
def test_a_common_beginning_is_read_once_and_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = next(case for case in CASES if case.model_type == family).build(torch.float64)
    blocks, front = Blocks(base), list(range(10, 40))
    rows = [[*front, 5, 6, 7], [*front, 8, 9, 10, 11, 12], [*front, 13]]
    found, last = outputs_of(blocks, rows, [2, 5, 1], [1, 3])
    monkeypatch.setattr("npt.editing.absorbing.stream.PREFIX", 1000)
    whole, plain = outputs_of(blocks, rows, [2, 5, 1], [1, 3])
    # Gemma's norms and rotary angles are float32 whatever the model's format is.
    assert torch.allclose(last, plain, atol=1e-5)
    assert all(torch.allclose(found[layer], whole[layer], atol=1e-5) for layer in (1, 3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2", "granite"])
def test_enough_rank_and_no_ridge_bring_a_block_to_the_teacher(family: str) -> None:
    """The last block's output of the student is the teacher's, whatever norm or multiplier stands behind the projection."""
    base = next(case for case in CASES if case.model_type == family).build(torch.float64)
    blocks, tokenizer = Blocks(base), spelling_tokenizer()
    dialogue = Dialogue(tokenizer, base.config, 96, "question")
    conversations = [
        dialogue.conversation("Bo is red.", "Is Bo?", tokenizer(" yes", add_special_tokens=False).input_ids)
    ]
    last = len(blocks) - 1
    lesson, patches = Lesson(blocks, conversations, [last]), Patches(blocks, [])
    text = {last: torch.eye(blocks.shape(last)[0], dtype=torch.float64)}
    before = float(lesson.kl())
    lesson.fit(Setting((last,), 1e-7, 1e-7, 512), text, patches)
    # A norm keeps the projection's scale to first order only.
    assert float(lesson.kl()) < (0.2 if blocks.family.out else 1e-3) * before
    patches.close()


# -- text that is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_many_prompts_are_continued_as_each_alone(kind: str) -> None:
    base, tokenizer = random_base(kind, torch.float32), spelling_tokenizer()
    texts = ["a common beginning, then one", "a common beginning, then another", "a common beginning"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    found = continued(base, tokenizer, prompts, [6, 4, 0], lambda ids: False)
    alone = [continue_text(base, tokenizer, text, count)[1] for text, count in zip(texts, (6, 4), strict=False)]
    assert found == [*alone, []]
    one, other = (continued(base, tokenizer, prompts[:2], [5, 5], lambda ids: False, seed=seed) for seed in (1, 2))
    assert one != other and one == continued(base, tokenizer, prompts[:2], [5, 5], lambda ids: False, seed=1)


def test_questions_are_written_once_each_in_wordings_side_by_side() -> None:
    base = random_base("llama", torch.float32)
    base.config.max_position_embeddings = 4096
    dialogue = Dialogue(chatting(), base.config, 96)
    found = Questions(base, dialogue, Options(number=9, phrasings=2), False).about(
        [context_from("Bo is a red cat.", "c")]
    )
    texts = [question.text for question in found]
    assert len(set(texts)) == len(texts) and 4 <= len(found) <= 9
    own = [question for question in found if question.source >= 0]
    assert (
        own and all(question.context == 0 for question in own) and sum(question.source < 0 for question in found) >= 3
    )
    sources = [question.source for question in own]
    assert sources == sorted(sources) and max(sources.count(source) for source in sources) == 2


def test_held_out_questions_are_other_wordings() -> None:
    learn, choose, report = split([0, 0, 1, 1, 2, 2, 3, 3, -1, -2])
    assert sorted(learn) == [0, 2, 4, 5, 6, 8, 9]
    assert choose == [1, 7] and report == [3]
    assert [len(part) for part in split(list(range(16)))] == [12, 2, 2]
    assert split([0]) == ([0], [], [])


# -- dialogues -------------------------------------------------------------------------------------------------------------


def test_a_chat_has_the_context_as_its_system_message() -> None:
    dialogue = Dialogue(chatting(), random_base("llama").config, 96)
    assert dialogue.style == "chat" and dialogue.system
    assert dialogue.around("Bo is red.") == ("[Bo is red.]<user>", "</s><assistant>")
    assert dialogue.around(None) == ("<user>", "</s><assistant>")


def test_a_template_without_system_messages_has_it_before_the_question() -> None:
    dialogue = Dialogue(chatting(WITHOUT_SYSTEM), random_base("llama").config, 96)
    assert not dialogue.system and dialogue.around("Bo is red.")[0] == "<user>Bo is red.\n\n"


def test_examples_are_messages_before_the_question() -> None:
    dialogue = Dialogue(chatting(), random_base("llama").config, 96)
    context = context_from([{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}], "c")
    assert dialogue.around(context)[0] == "<user>1?</s><assistant>one</s><user>"
    with pytest.raises(DataError, match="no chat template; write the examples as text"):
        Dialogue(spelling_tokenizer(), random_base("llama").config, 96).around(context)


def test_a_base_model_reads_plain_text() -> None:
    config = random_base("llama").config
    assert Dialogue(spelling_tokenizer(), config, 96).around("Bo.") == ("Bo.\n\nQuestion: ", "\nAnswer:")
    assert Dialogue(spelling_tokenizer(), config, 96, "text").around("Bo.") == ("Bo.\n\n", "")
    with pytest.raises(DataError, match="no chat template; use style='question' or 'text'"):
        Dialogue(spelling_tokenizer(), config, 96, "chat")


def test_shared_tokens_are_those_of_question_and_answer() -> None:
    tokenizer = spelling_tokenizer()
    one = Dialogue(tokenizer, random_base("llama").config, 96).conversation(
        "Bo.", "Who?", tokenizer(" me").input_ids[1:]
    )
    assert one.student[-one.shared :] == one.teacher[-one.shared :] and one.answer == 3 and one.reply == "me"
    assert tokenizer.decode(one.student[-one.shared :]) == "Question: Who?<pad>Answer: me"  # it has no line break


# -- teachers --------------------------------------------------------------------------------------------------------------


def teacher(positions: int = 128, **options: Any) -> Teacher:
    base = random_base("llama", torch.float32)
    base.config.max_position_embeddings = positions
    dialogue = Dialogue(spelling_tokenizer(), base.config, 96, "question")
    return Teacher(Blocks(base), dialogue, Options(new_tokens=4, phrasings=1, **options), False)


def test_a_long_context_is_taught_in_chunks_of_the_window() -> None:
    one = teacher(160)
    text = "\n\n".join(f"The mill of Tam number {i} is old and red." for i in range(6))
    chunks = one.chunks(text)
    assert len(chunks) > 2 and "".join(map(str, chunks)).replace("\n", "") == text.replace("\n", "")
    assert all(len(one.dialogue.prompt(chunk, "?")) + 68 <= 160 for chunk in chunks)
    assert one.chunks("short") == ["short"]
    taught = one.teach(text, ["Is it old?", "Is it red?", "What is it?"], None)
    conversations = [*taught.learn, *taught.choose, *taught.report]
    assert all(len(c.teacher) <= 160 for c in conversations)
    assert pieces("a b c", 1, lambda text: len(text.split())) == ["a", "b", "c"]


def test_questions_without_an_answer_are_named_and_left_out() -> None:
    one = teacher()
    long = "Is " + "x" * 90
    taught = one.teach("Bo is a red cat of old.", ["Is Bo red?", long, "Is Bo old?", "Who is Bo?"], None)
    assert (
        len(taught.left_out) == 1
        and taught.left_out[0].startswith("Is xxx")
        and "no position is left" in taught.left_out[0]
    )
    assert long not in {c.question for c in (*taught.learn, *taught.choose, *taught.report)}


def test_given_answers_are_taught() -> None:
    taught = teacher().teach(
        "Bo is red.", ["Is Bo red?", "Who is Bo?", "Is it so?"], ["yes it is", "a cat", "so it is"]
    )
    replies = {c.question: c.reply for c in (*taught.learn, *taught.choose, *taught.report)}
    assert replies["Is Bo red?"] == "yes it is" and replies["Who is Bo?"] == "a cat"


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"numbr": 3}, "absorb has no such option; use number"), ({"number": 3}, "whole number from 4"),
        ({"rank": 513}, "from 1 to 512"), ({"limit": 0}, "limit=0: use a number above 0"), ({"limit": None}, "number above 0"),
        ({"steps": -1}, "steps=-1: use a whole number from 0"), ({"rate": None}, "rate=None: use a number above 0$"),
        ({"mu": -1}, "mu=-1: use a number above 0, or None"), ({"style": "html"}, "style='html' is unknown"),
        ({"start": "one"}, "start='one' is unknown; use zero or closed"), ({"mu": 4.0}, "mu=4.0: is of the closed form"),
        ({"lam": 0.1, "steps": 3}, "lam=0.1: is of the closed form; use .*steps=0"),
        ({"rate": 0.1, "steps": 0}, "rate=0.1: is of steps by gradient; use more than 0"),
        ({"start": "zero", "steps": 0}, "start=zero: is of steps by gradient"),
    ],
)  # fmt: skip
def test_options_that_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(NPTError, match=words):
        options_of(given)


@pytest.mark.parametrize("blocks", ["all", [], [4], [-1], [1.5], 3])
def test_blocks_that_are_refused(blocks: Any) -> None:
    with pytest.raises(NPTError, match="blocks="):
        blocks_of_choice(blocks, 4)
    assert blocks_of_choice([3, 1, 3], 4) == (1, 3) and blocks_of_choice("auto", 4) is None


@pytest.mark.parametrize(
    ("questions", "answers", "words"),
    [
        ("Who?", None, "questions='Who\\?': use a list"), ([], None, "there are none"), ([" "], None, "text 1: is blank"),
        (["a", "a"], None, "text 2: 'a' stands there before"), (["a"], ["b", "c"], "answers: 2 for 1 questions"),
        (None, ["b"], "answers: 1 for no questions"), ([3], None, "text 1=3: use text"),
    ],
)  # fmt: skip
def test_questions_that_are_refused(questions: Any, answers: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        questions_from(questions, answers)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ("", "is blank"), ([], "holds no message"), (3, "is int"), ("a\ud800", "not Unicode"),
        ([{"role": "user", "content": "a"}], "ends with a user's message"), ([{"role": "king"}], "unknown role"),
    ],
)  # fmt: skip
def test_contexts_that_are_refused(context: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        context_from(context, "context")


def test_files_of_contexts_and_questions(tmp_path: Path) -> None:
    text, chat, lines, rows = (tmp_path / name for name in ("c.txt", "c.json", "q.txt", "q.jsonl"))
    text.write_text("Bo is red.\n")
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]
    chat.write_text(json.dumps(messages))
    lines.write_text("Who?\n\nWhere?\n")
    rows.write_text('{"question": "Who?", "answer": "Bo"}\n')
    assert read_context(text) == "Bo is red." and read_context(chat) == tuple(messages)
    assert read_questions(lines) == (["Who?", "Where?"], None) and read_questions(rows) == (["Who?"], ["Bo"])
