"""The absorbed contexts of a store as JSON and tensors, and back, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from npt.common.display import one_line
from npt.editing.absorbing.absorbed import Absorbed, Compared, Figures
from npt.editing.absorbing.contexts import Contexts
from npt.editing.absorbing.dialogue import Conversation, context_from, shown
from npt.editing.absorbing.settings import STARTS, Setting
from npt.editing.requests import Request
from npt.editing.solve import Factors

#: Names of the tensors that are kept beside every context, and of the text that contexts were absorbed beside.
_SIDES = ("student", "teacher")
TEXT = ("text.ids", "text.lengths")
_GROUPS = ("learnt", "reported")
#: The names of a context in edits.json and the type of each.
_PLAIN: dict[str, type] = {
    "id": str, "values": str, "passes": int, "before": str, "after": str, "holds": bool, "note": str,
    "style": str, "new_tokens": int,
}  # fmt: skip


def described(one: Absorbed) -> dict[str, Any]:
    """A context, as edits.json describes it; token ids are tensors."""
    kept = {name: getattr(one, name) for name in _PLAIN}
    context = one.context if isinstance(one.context, str) else list(one.context)
    groups = {
        name: [
            {
                "question": c.question, "reply": c.reply, "student": len(c.student), "teacher": len(c.teacher),
                "shared": c.shared, "answer": c.answer,
            }
            for c in getattr(one, name)
        ]
        for name in _GROUPS
    }  # fmt: skip
    return {
        **kept, "context": context, "setting": asdict(one.setting), "figures": asdict(one.figures),
        "compared": [asdict(row) for row in one.compared], "left_out": list(one.left_out), **groups,
    }  # fmt: skip


def tensors_of(contexts: Contexts) -> dict[str, Tensor]:
    """The tensors that undoing and merging need beside edits.json, and the weight deltas."""
    if not contexts.ledger:
        return {}
    found = {}
    for id, one in contexts.ledger.items():
        for side in _SIDES:
            ids = [token for c in (*one.learnt, *one.reported) for token in getattr(c, side)]
            found[f"{id}.{side}"] = torch.tensor(ids, dtype=torch.int32)
    found |= tensors_of_rows(contexts.general.rows(), TEXT)
    for layer, factors in contexts.factors.items():
        found |= {f"block{layer}.left": factors.left.contiguous(), f"block{layer}.right": factors.right.contiguous()}
    return found


def tensors_of_rows(rows: Sequence[Sequence[int]], names: tuple[str, str]) -> dict[str, Tensor]:
    """Token ids of rows in two tensors: all of them, and the length of each row.

    Args:
        rows: token ids.
        names: of the two tensors.
    """
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return {names[0]: ids, names[1]: torch.tensor([len(row) for row in rows], dtype=torch.int32)}


def rows_of(tensors: Mapping[str, Tensor], names: tuple[str, str]) -> list[list[int]]:
    """The rows of `tensors_of_rows`.

    Raises:
        ValueError: the two tensors do not fit each other.
    """
    lengths = tensors[names[1]].tolist()
    if any(length < 1 for length in lengths) or sum(lengths) != len(tensors[names[0]]):
        raise ValueError(names[1])
    return [part.tolist() for part in tensors[names[0]].split(lengths)]


def names_in(records: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of `tensors_of` for the contexts of a checked edits.json."""
    if not records:
        return set()
    blocks = {block for record in records for block in record["setting"]["blocks"]}
    sides = {f"{record['id']}.{side}" for record in records for side in _SIDES}
    return sides | set(TEXT) | {f"block{block}.{part}" for block in blocks for part in ("left", "right")}


def read(record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Absorbed:
    """A context from edits.json.

    Args:
        record: the context's object there.
        tensors: with its token ids; None leaves conversations without them, as for a list.

    Raises:
        DataError, KeyError, TypeError, ValueError: damaged.
    """
    plain = {name: _typed(record, name, kind) for name, kind in _PLAIN.items()}
    context = context_from(record["context"], "context")
    groups: dict[str, list[Conversation]] = {}
    at = dict.fromkeys(_SIDES, 0)
    for name in _GROUPS:
        groups[name] = []
        for row in _typed(record, name, list):
            ids = {}
            for side in _SIDES:
                count = _typed(row, side, int)
                whole = None if tensors is None else tensors[f"{plain['id']}.{side}"]
                ids[side] = () if whole is None else tuple(whole[at[side] : at[side] + count].tolist())
                at[side] += count
                if count < 2 or (whole is not None and len(ids[side]) != count):
                    raise ValueError(f"{side}={count}")
            shared, answer = (_typed(row, key, int) for key in ("shared", "answer"))
            if not 0 < answer <= shared < row["student"] or shared > row["teacher"]:
                raise ValueError(f"shared={shared}")
            groups[name].append(
                Conversation(
                    _typed(row, "question", str), _typed(row, "reply", str), **ids, shared=shared, answer=answer
                )
            )
    if not groups["learnt"]:
        raise ValueError("learnt is empty")
    setting = _setting(record["setting"])
    return Absorbed(
        **plain, request=Request(shown(context), ""), context=context, setting=setting, layers=setting.blocks,
        learnt=tuple(groups["learnt"]), reported=tuple(groups["reported"]),
        compared=tuple(_row(Compared, row) for row in _typed(record, "compared", list)),
        figures=_row(Figures, record["figures"]), left_out=tuple(map(str, _typed(record, "left_out", list))),
    )  # fmt: skip


def _typed(record: Mapping[str, Any], name: str, kind: type) -> Any:
    if type(record[name]) is not kind:
        raise TypeError(f"{name}={one_line(repr(record[name]), 40)}")
    return record[name]


def _setting(record: Mapping[str, Any]) -> Setting:
    blocks = tuple(_typed(record, "blocks", list))
    if (
        not blocks
        or any(type(block) is not int or block < 0 for block in blocks)
        or list(blocks) != sorted(set(blocks))
    ):
        raise ValueError(f"blocks={one_line(repr(list(blocks)), 40)}")
    values = {name: _number(record[name], name) for name in ("mu", "lam")}
    rank = _typed(record, "rank", int)
    if rank < 1:
        raise ValueError(f"rank={rank}")
    # Stores of versions without steps have none, and those of versions that began at the closed form alone no start.
    steps = _typed({"steps": 0} | dict(record), "steps", int)
    rate = _number(record.get("rate", Setting.rate), "rate")
    start = record.get("start", Setting.start)
    if steps < 0 or not rate or start not in STARTS:
        raise ValueError(f"steps={steps}, rate={rate}, start={one_line(repr(start), 40)}")
    return Setting(blocks, values["mu"], values["lam"], rank, steps, rate, start)


def _row(kind: Any, record: Mapping[str, Any]) -> Any:
    values = {}
    for field in fields(kind):
        value = record[field.name]
        values[field.name] = _typed(record, field.name, str) if field.type == "str" else _number(value, field.name)
    return kind(**values)


def _number(value: Any, name: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}={one_line(repr(value), 40)}")
    return value


def put_back(contexts: Contexts, records: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[Absorbed]:
    """Puts the contexts of a checked edits.json to work.

    Raises:
        DataError, KeyError, TypeError, ValueError: the tensors are not those of these contexts and this model.
    """
    if not records:
        return []
    ledger = [read(record, tensors) for record in records]
    rows = rows_of(tensors, TEXT)
    factors = {}
    for layer in sorted({block for one in ledger for block in one.setting.blocks}):
        if layer >= len(contexts.blocks):
            raise ValueError(f"block {layer} of {len(contexts.blocks)}")
        left, right = tensors[f"block{layer}.left"], tensors[f"block{layer}.right"]
        width, size = contexts.blocks.shape(layer)
        if left.dim() != 2 or (len(left), right.shape[-1]) != (size, width) or left.shape[1] != len(right):
            raise ValueError(f"block{layer} is for a projection of {right.shape[-1]} to {len(left)} numbers")
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise ValueError(f"block{layer}")
        factors[layer] = Factors(left, right)
    contexts.restore(ledger, factors, rows)
    return ledger
