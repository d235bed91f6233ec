"""What reads people's input keeps its properties on generated inputs, the same ones in every run."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npt.common.display import visible
from npt.config import RunConfig, known_keys, load_config, save_config
from npt.data import pack_token_ids
from npt.data.chats import Chat
from npt.data.packing import IGNORED
from npt.data.readers import PACKED, READERS
from npt.data.sources import TextFiles
from npt.errors import ConfigError, DataError

FEW = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
NAMES = sorted(known_keys())

scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 40) | st.floats() | st.text(max_size=12)
    | st.dates() | st.binary(max_size=8) | st.sampled_from(["upper_half", "self", "text", "no", "1e-3", "builtin:x"])
)  # fmt: skip
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), v, max_size=4)
)
sections = st.dictionaries(st.sampled_from([name.split(".")[1] for name in NAMES]) | st.text(max_size=8), values)
files = st.dictionaries(st.sampled_from([*RunConfig.model_fields, "modle"]), sections | values, max_size=4) | values


def one_line(error: Exception) -> bool:
    return visible(error) == str(error) and str(error).splitlines() == [str(error)]


def loaded(text: bytes | None, overrides: Sequence[str] = ()) -> RunConfig | None:
    """The configuration, or None where it is refused in one line; a configuration survives being saved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        if text is not None:
            path.write_bytes(text)
        try:
            config = load_config(None if text is None else path, overrides)
        except ConfigError as error:
            assert one_line(error), error
            return None
        save_config(config, path)
        assert load_config(path) == config
        return config


@FEW
@given(files)
def test_any_file_is_a_configuration_or_refused_in_one_line(values: Any) -> None:
    loaded(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))


@FEW
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_configuration_or_refused_in_one_line(data: bytes) -> None:
    loaded(data)


@FEW
@given(st.sampled_from(NAMES) | st.text(max_size=12), values, st.text(max_size=20))
def test_any_override_is_taken_or_refused_in_one_line(key: str, value: Any, raw: str) -> None:
    dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    loaded(None, [f"{key}={dumped.removesuffix('...' + chr(10)).strip()}"])
    loaded(None, [f"{key}={raw}"])
    loaded(None, [raw])


good = st.fixed_dictionaries(
    {},
    optional={
        "model.rank": st.integers(0, 2**31 - 1),
        "model.npt_layers": st.sampled_from(["all", "lower_half"])
        | st.lists(st.integers(-99, 99), min_size=1, unique=True),
        "model.modulation_scale": st.floats(1e-9, 1e9),
        "model.gain": st.sampled_from(["none", "norm", "overlap", "state", "denominator"]),
        "model.target_projections": st.permutations(["gate", "up", "down"]).map(lambda names: names[:2]),
        "training.learning_rate": st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False),
        "training.num_train_steps": st.none() | st.integers(0, 2**31 - 1),
        "training.calibrate": st.booleans(),
        "training.seed": st.integers(0, 2**32 - 1),
        "data.calibration_files": st.none()
        | st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1), max_size=3),
        "wandb.tags": st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1), max_size=3),
    },
)


@FEW
@given(good)
def test_good_values_survive_a_file_and_overrides(wanted: dict[str, Any]) -> None:
    nested: dict[str, dict[str, Any]] = {}
    for name, value in wanted.items():
        nested.setdefault(name.split(".")[0], {})[name.split(".")[1]] = value
    config = loaded(yaml.safe_dump(nested, allow_unicode=True).encode())
    assert config is not None
    for name, value in wanted.items():
        section, key = name.split(".")
        assert getattr(getattr(config, section), key) == value
    flat = {k: yaml.safe_dump(v, default_flow_style=True, width=10**9).split("\n...")[0] for k, v in wanted.items()}
    assert loaded(None, [f"{key}={text.strip()}" for key, text in flat.items()]) == config


def _parquet(texts: list[str | None]) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), buffer)
    return buffer.getvalue().to_pybytes()  # type: ignore[no-any-return]


rows = st.lists(
    st.dictionaries(st.sampled_from(["text", "body"]), st.none() | st.text(max_size=20) | st.integers(), max_size=2)
)
parts = st.none() | st.text(max_size=8) | st.integers() | st.lists(st.just({"type": "text", "text": "x"}) | st.none())
messages = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "name"]), parts | st.just("user"))
chats = st.lists(st.dictionaries(st.sampled_from(["text", "messages", "conversations"]), st.lists(messages) | parts))
contents = st.one_of(
    chats.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    chats.map(lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    st.lists(st.lists(st.sampled_from(["text", "a", '"', '"b"', "\n", " "]))).map(
        lambda x: "\n".join(map(",".join, x)).encode()
    ),
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    rows.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)).map(_parquet),
)


@FEW
@given(
    contents,
    st.sampled_from([*READERS, *(f".jsonl{ending}" for ending in PACKED)]),
    st.integers(0, 400),
    st.integers(0, 255),
)
def test_any_file_holds_documents_or_is_refused_in_one_line(data: bytes, kind: str, at: int, byte: int) -> None:
    broken = bytearray(data)
    if at < len(broken):
        broken[at] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{kind}"
        for content in (data, bytes(broken)):
            path.write_bytes(content)
            try:
                documents = list(found := TextFiles([path]))
            except DataError as error:
                assert one_line(error), error
                continue
            assert len(documents) == len(found) > 0
            assert all(d.content() if isinstance(d, Chat) else d.strip() and d.encode("utf-8") for d in documents)


@FEW
@given(
    st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), max_size=12),
    st.integers(2, 9),
    st.none() | st.integers(1, 6),
    st.booleans(),
)
def test_packing_keeps_every_token_once_and_in_order(
    documents: list[list[int]], length: int, most: int | None, keep: bool
) -> None:
    tokens = [token for document in documents for token in document]
    firsts = [at == 0 for document in documents for at in range(len(document))]
    if not tokens:
        try:
            pack_token_ids(documents, length, pad_token_id=7, max_blocks=most)
        except DataError as error:
            assert one_line(error)
            return
        raise AssertionError("nothing was packed without an error")
    blocks = pack_token_ids(documents, length, pad_token_id=7, max_blocks=most, keep_remainder=keep)
    whole = len(tokens) // length
    padded = len(tokens) % length > 0 and (keep or whole == 0)
    count = whole + padded if most is None else min(most, whole + padded)
    assert len(blocks) == count
    columns = (list(chain.from_iterable(blocks[name])) for name in ("input_ids", "attention_mask", "labels"))
    ids, mask, labels = columns
    real = min(count * length, len(tokens)) if padded else count * length
    assert mask == [1] * real + [0] * (len(mask) - real)
    assert ids == tokens[:real] + [7] * (len(ids) - real)
    # A document's first token is predicted by nothing; every other token is its own label; padding is never scored.
    expected = [IGNORED if first else token for token, first in zip(tokens, firsts, strict=True)][:real]
    assert labels == expected + [IGNORED] * (len(labels) - real)
