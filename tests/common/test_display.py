"""Values as people read them."""

from __future__ import annotations

import pytest

from npt.common.display import blocks_text, human_bytes, model_name, ranges, visible


@pytest.mark.parametrize(
    "numbers, text",
    [
        (list(range(15, 30)), "15 to 29"),
        ([4], "4"),
        ([2, 3], "2 and 3"),
        ([0, 3, *range(15, 30)], "0, 3 and 15 to 29"),
        ([2, 3, 4, 7, 9, 10], "2 to 4, 7, 9 and 10"),
        ([7, 5, 6, 5], "5 to 7"),
        (range(80), "0 to 79"),
        ("upper_half", "upper_half"),
        ([], "[]"),
        ([1, "\x1b[31m"], "[1, '\\x1b[31m']"),
        ([True, 2], "[True, 2]"),
        (None, "None"),
    ],
)
def test_ranges(numbers: object, text: str) -> None:
    assert ranges(numbers) == text


def test_ranges_beyond_the_limit_are_counted() -> None:
    every_second = list(range(0, 80, 2))
    assert ranges(every_second, most=3) == "0, 2, 4 and 37 more"
    assert ranges([0, 1, 2, 5, 7, 8], most=2) == "0 to 2, 5 and 2 more"
    assert ranges([0, 2, 4], most=3) == ranges([0, 2, 4]) == "0, 2 and 4"


def test_one_block_and_several() -> None:
    assert blocks_text([4]) == "block 4" and blocks_text([3, 4]) == "blocks 3 and 4"
    assert blocks_text("all") == "blocks all" and blocks_text(range(0, 40, 2), most=2) == "blocks 0, 2 and 18 more"
    assert blocks_text([4], of="base", verb=True) == "block 4 of base is"
    assert blocks_text([3, 4], verb=True) == "blocks 3 and 4 are"


@pytest.mark.parametrize(
    "source, name",
    [
        ("/home/someone/models/stories260k", "stories260k"),
        ("/home/someone/models/stories260k/", "stories260k"),
        ("../shared/models/stories260k", "stories260k"),
        ("~/models/mine", "mine"),
        ("./mine", "mine"),
        ("a/longer/way", "way"),
        ("/models/llama.Q4_K_M.gguf", "llama.Q4_K_M.gguf"),
        ("/x/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/7e27bd9f9532", "HuggingFaceTB/SmolLM2-135M"),
        ("cache/models--gpt2/snapshots/607a30d783/", "gpt2"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("builtin:tiny", "builtin:tiny"),
        ("/", "/"),
        ("/a/\x1b[31mred", "\\x1b[31mred"),
    ],
)  # fmt: skip
def test_the_model_is_named_and_not_the_way_to_it(source: str, name: str) -> None:
    assert model_name(source) == name


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (5, 1536, 3 * 2**40)] == ["5 B", "1.50 KiB", "3.00 TiB"]


def test_visible() -> None:
    assert visible("a\x1b[31m\u202e\x00\ud800b\n\té") == "a\\x1b[31m\\u202e\\x00\\ud800b\n\té"
