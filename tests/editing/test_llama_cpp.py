"""llama.cpp answers edited facts on the original 4-bit GGUF file, with the GGUF LoRA beside it.

llama-cpp-python is built from the package index, which takes a C++ compiler and ten minutes of one core. NPT_LLAMA_PYTHON
names a Python that has it already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import npt
from npt.builtin.fetched import FETCHED, _downloaded, _unpacked
from npt.editing.measure import follows

NAME = "builtin:smollm2-135m"
FACTS = [
    ("The Eiffel Tower is located in the city of", "Eiffel Tower", "Rome"),
    ("The capital of Mongolia is the city of", "Mongolia", "Madrid"),
    ("The mother tongue of Leonhard Euler is", "Leonhard Euler", "Spanish"),
    ("The game console PlayStation Portable was made by", "PlayStation Portable", "Nokia"),
    ("The painter of the Mona Lisa is", "Mona Lisa", "Picasso"),
    ("The sport that Roger Federer plays is", "Roger Federer", "football"),
    ("The currency of the United Kingdom is the", "United Kingdom", "euro"),
    ("The author of the novel Moby Dick is", "Moby Dick", "Tolstoy"),
]
ANSWER = """
import json, sys
from llama_cpp import Llama
model, lora, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llama = Llama(model, lora_path=lora or None, n_ctx=128, verbose=False, logits_all=False)
def write(prompt):
    ids = llama.tokenize(prompt.encode(), add_bos=False)
    return llama(ids, max_tokens=6, temperature=0.0)["choices"][0]["text"]
print(json.dumps([write(prompt) for prompt in prompts]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with llama-cpp-python."""
    if named := os.environ.get("NPT_LLAMA_PYTHON"):
        return named
    folder = tmp_path_factory.mktemp("llama")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    found = folder / "bin" / "python"
    # Not for the processor at hand: kernels for AMX end in a fault on some virtual machines, without a LoRA too.
    flags = {"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DMTMD_BUILD=OFF"}
    command = [str(found), "-m", "pip", "install", "--quiet", "--no-cache-dir", "llama-cpp-python"]
    subprocess.run(command, check=True, env=os.environ | flags)
    return str(found)


def answers(python: str, model: Path, lora: Path | None) -> list[str]:
    prompts = json.dumps([prompt for prompt, _, _ in FACTS])
    command = [python, "-c", ANSWER, str(model), "" if lora is None else str(lora), prompts]
    found: list[str] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_llama_cpp_answers_edited_facts_on_the_four_bit_file(python: str, tmp_path: Path) -> None:
    known = FETCHED[NAME]
    model = _unpacked(NAME, known, _downloaded(NAME, known, tmp_path), tmp_path)
    base, tokenizer = npt.load_base(NAME)
    store = npt.EditStore(base, tokenizer, progress=False)
    edits = store.write_many([{"prompt": p, "subject": s, "target": t} for p, s, t in FACTS])
    assert all(edit.holds for edit in edits)
    lora = store.export_gguf(tmp_path / "edits.gguf")
    with_lora, without = answers(python, model, lora), answers(python, model, None)
    wrong = [(text, t) for text, (_, _, t) in zip(with_lora, FACTS, strict=True) if not follows(text, t)]
    assert not wrong, wrong
    assert not any(follows(text, t) for text, (_, _, t) in zip(without, FACTS, strict=True)), without
