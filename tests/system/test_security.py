"""Nothing harmful gets in: no pickle is read, no secret written, hostile text stays text, names stay in their folder."""

from __future__ import annotations

import html
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from npt import NPTConfig
from npt.cli import main
from npt.equivalence.teacher import teacher_cache
from npt.errors import ConversionError, DataError
from tests.helpers import blocks, converted, random_base, settings, visit

SECRETS = {
    "HF_TOKEN": "hf_sEcReTsEcReTsEcReTsEcReT", "WANDB_API_KEY": "0123456789abcdefSECRET0123456789abcdef",
    "OWN": "p4ssw0rd-SECRET",
}  # fmt: skip
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31mred\x1b]0;title\x07 \u202eevil\u2066 {{ 7 * 7 }} "


def everything_written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_secret_is_written_and_no_pickle_read(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A whole run, its resumption, evaluation and generation: environment variables stay where they are."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle was read"))
    arguments = settings(local_model, tmp_path)
    assert main(["train", *arguments]) == 0
    assert main(["train", *arguments, "--resume"]) == 0
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoints" / "best_model")]
    assert main(["evaluate", *checkpoint, "--output", str(tmp_path / "r.json"), *arguments]) == 0
    assert main(["generate", "a", "--max-new-tokens", "2", *checkpoint, *arguments]) == 0
    written = everything_written(tmp_path)
    assert len(written) > 20
    shown = capfd.readouterr()
    for value in SECRETS.values():
        assert [name for name, content in written.items() if value.encode() in content] == []
        assert value not in shown.out and value not in shown.err
    # Neither a bare pickle nor one in PyTorch's zip.
    assert [
        n for n, c in written.items() if c[:1] == b"\x80" or c[:2] == b"PK" or n.endswith((".bin", ".pt", ".pkl"))
    ] == []


def test_a_run_on_hostile_text(
    local_model: Path,
    tmp_path: Path,
    browser: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Markup, escapes and direction marks in text, file names and model names: nothing executes, nothing escapes."""
    name = "a<img src=x onerror=alert(3)>\u202e\x1b[31m.txt"
    (tmp_path / name).write_text((HOSTILE * 12 + "\n") * 20, encoding="utf-8")
    model = tmp_path / "model<b>\u202e"
    model.symlink_to(local_model)
    arguments = settings(
        model, tmp_path, data__dataset_name="text", data__data_files=json.dumps([str(tmp_path / name)]),
        data__eval_texts=json.dumps([str(tmp_path / f"other {name}")]), data__score_seen_text="true",
    )  # fmt: skip
    (tmp_path / f"other {name}").write_text(HOSTILE * 40, encoding="utf-8")
    assert main(["train", *arguments]) == 0
    shown = capfd.readouterr()
    for stream in (shown.out, shown.err):
        assert not set(stream) & set("\u202e\u2066\x07") and "\x1b]0;" not in stream and "\x1b[31mred" not in stream
    text = (tmp_path / "outputs" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=x" not in text and not set(text) & set("\u202e\u2066\x1b\x07")
    assert html.escape("onerror=alert(3)") in text or "onerror=alert(3)" in text, "the name is shown, as text"
    page, said, asked = visit(browser, tmp_path / "outputs" / "report.html", 1280)
    assert said == [] and asked == [] and page.locator("script").count() == 0


@pytest.mark.parametrize("name", ["../../outside", "/absolute", "a/b", "..", "", "a\\b"])
def test_an_adapters_name_is_no_path(name: str) -> None:
    """PEFT saves every adapter but the first to a folder of its name."""
    with pytest.raises(ConversionError, match="adapter name .* letters, digits"):
        get_peft_model(random_base("llama"), NPTConfig(rank=2), adapter_name=name)


@pytest.mark.parametrize(
    "values",
    [{"shard_blocks": 0}, {"shard_blocks": -1}, {"blocks": "4"}, {"layers": "all"}, {"layers": ["../x"]}, {"top_k": 1.5}],
)  # fmt: skip
def test_a_teacher_record_of_other_kinds_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    model, text = converted("llama"), blocks(4)
    teacher_cache(tmp_path, model, text, "hidden")
    record = tmp_path / "hidden" / "targets.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **values}))
    with pytest.raises(DataError, match=r"targets\.json: not readable"):
        teacher_cache(tmp_path, model, text, "hidden")
