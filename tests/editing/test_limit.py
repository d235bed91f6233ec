"""`limit`: facts share what they may do to text; values are shortened, in a way that depends on the facts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npt import EditStore, load_base
from npt.editing.joint import CAPS, shortened
from npt.editing.solve import Pairs
from npt.errors import CheckpointError, NPTError
from tests.helpers import OPEN

NAMES = ("Tim", "Sara", "Ben", "Lily", "Max", "Anna")
FACTS = [
    {"prompt": f"One day, {name} saw a big", "subject": name, "target": target}
    for name, target in zip(NAMES, ("cat", "hat", "dog", "boat", "tree", "bear"), strict=True)
]
OPTIONS: dict[str, Any] = {
    "layer": [2, 3],
    "metric": "text",
    "progress": False,
    "decay": 0.0,
    "steps": 4,
    "contexts": 0,
}
#: Below what these facts do to text when they are as long as they were found.
LIMIT = 0.001


@pytest.fixture(scope="module")
def tiny() -> Any:
    """(model, tokenizer) of the package's own small model."""
    return load_base("builtin:tiny", dtype="float32")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the model's own text is kept."""
    return tmp_path_factory.mktemp("kept")


def store(tiny: Any, kept: Path, **options: Any) -> EditStore:
    texts = ["Once upon a time, there was a little girl named Lily. She liked to play.", "Tom had a ball."]
    OPEN.append(EditStore(*tiny, **{**OPTIONS, "statistics": texts, "cache_dir": kept, **options}))
    return OPEN[-1]


def delta(one: EditStore) -> list[Tensor]:
    return [factors.delta for factors in one.factors.values()]


def damage(one: EditStore) -> float:
    """On the text that the limit is about."""
    from npt.editing.measure import mean_kl_of

    return mean_kl_of(one.bench, one.contexts.watched_rows())


def test_values_are_shortened_until_text_is_within_the_limit(tiny: Any, kept: Path) -> None:
    free = store(tiny, kept)
    free.write_many(FACTS)
    before = damage(free)
    assert free.joint.cap is None and before > LIMIT
    free.close()
    limited = store(tiny, kept, limit=before / 4)
    limited.write_many(FACTS)
    assert limited.joint.cap in CAPS and damage(limited) <= before / 4
    held = [row.holds for row in limited.verify()]
    assert held == [edit.holds for edit in limited.edits]
    limited.undo(limited.edits[0].id)
    assert limited.joint.cap is None or limited.joint.cap >= CAPS[-1]


def test_a_limit_that_is_kept_anyway_changes_nothing(tiny: Any, kept: Path) -> None:
    one, other = store(tiny, kept), None
    one.write_many(FACTS[:3])
    expected = delta(one)
    one.close()
    other = store(tiny, kept, limit=100.0)
    other.write_many(FACTS[:3])
    assert other.joint.cap is None and all(map(torch.equal, delta(other), expected))


def test_order_and_undo_do_not_matter_and_a_folder_keeps_it(tiny: Any, kept: Path, tmp_path: Path) -> None:
    one = store(tiny, kept, limit=LIMIT)
    one.write_many(FACTS)
    one.undo(one.edits[2].id)
    expected, joint = delta(one), one.joint
    assert joint.cap is not None
    one.save(tmp_path / "store")
    one.close()
    other = store(tiny, kept, limit=LIMIT)
    for fact in reversed([fact for fact in FACTS if fact is not FACTS[2]]):
        other.write(**fact)
    assert other.joint == joint and all(map(torch.equal, delta(other), expected))
    other.close()
    loaded = EditStore.load(*tiny, tmp_path / "store")
    OPEN.append(loaded)
    assert (loaded.limit, loaded.joint) == (LIMIT, joint) and all(map(torch.equal, delta(loaded), expected))
    (tmp_path / "store" / "edits.json").write_text(
        (tmp_path / "store" / "edits.json").read_text().replace(f'"limit": {LIMIT}', '"limit": "low"')
    )
    loaded.close()
    with pytest.raises(CheckpointError, match="limit='low' is not what npt writes there"):
        EditStore.load(*tiny, tmp_path / "store")


def test_no_value_is_longer_than_the_cap_and_short_ones_stay(tiny: Any, kept: Path) -> None:
    one = store(tiny, kept)
    one.write_many(FACTS[:2])
    (site, *_), keys = one.bench.sites, one.pairs[2].keys
    own = site.down.forward(keys.T.to(torch.float32)).detach().double().norm(dim=-1)
    values = torch.randn(site.size, keys.shape[1], dtype=torch.float64)
    values = values / values.norm(dim=0) * own * torch.tensor([0.3, 2.0], dtype=torch.float64)
    found = shortened(site, Pairs(keys, keys, values), 0.5).values
    assert torch.allclose(found[:, 0], values[:, 0]) and torch.allclose(found[:, 1].norm(), 0.5 * own[1], rtol=1e-5)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), True, "low"])
def test_a_limit_that_is_none_is_refused(tiny: Any, limit: Any) -> None:
    with pytest.raises(NPTError, match="limit=.*use None, or nats above 0"):
        EditStore(*tiny, limit=limit)
