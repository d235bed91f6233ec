"""Records of editing benchmarks: CounterFact's own format, and the flat ones in which CounterFact and zsRE are handed on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt.common.display import one_line
from npt.editing.requests import Request, request_of
from npt.errors import DataError


@dataclass(frozen=True)
class Neighbour:
    """A prompt whose text an edit shall leave alone. truth: what is right behind it; None where the record does not say."""

    prompt: str
    truth: str | None = None


@dataclass(frozen=True)
class Record:
    """One fact to write, and what is asked of it.

    request: the edit; it holds no paraphrase, since those below are asked. paraphrases: other prompts for the target.
    neighbours: prompts of other facts.
    """

    request: Request
    paraphrases: tuple[str, ...]
    neighbours: tuple[Neighbour, ...]


def read_records(path: Path) -> list[Record]:
    """The records of a JSON file that holds a list of objects.

    Raises:
        DataError: missing, unreadable, no list of objects, or an object of no known format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}); name a JSON file of records") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({one_line(error, 80)}); name a JSON file of records") from error
    if not isinstance(found, list) or not found:
        raise DataError(f"{path}: holds no list of records; write [{{...}}, ...]")
    return [record_of(values, f"{path} record {number}") for number, values in enumerate(found, 1)]


def record_of(values: Any, where: str) -> Record:
    """One record, of the format that its names belong to.

    Raises:
        DataError: no object, or a name is missing.
    """
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: not a JSON object but {type(values).__name__}; write {{...}}")
    try:
        if "requested_rewrite" in values:
            return _counterfact(values, where)
        return _flat_counterfact(values, where) if "prompt" in values else _zsre(values, where)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{where}: {one_line(repr(error), 60)}; use CounterFact's format (requested_rewrite, paraphrase_prompts, "
            "neighborhood_prompts), its flat one (prompt, subject, target_new, rephrase_prompt, locality_prompt) or zsRE's "
            "(src, subject, alt, rephrase, loc)"
        ) from error


def _counterfact(values: Mapping[str, Any], where: str) -> Record:
    wanted = values["requested_rewrite"]
    prompt, target = wanted["prompt"].format(wanted["subject"]), wanted["target_new"]["str"]
    truth = wanted["target_true"]["str"]
    request = request_of({"prompt": prompt, "subject": wanted["subject"], "target": target}, where)
    near = tuple(Neighbour(text, truth) for text in values["neighborhood_prompts"])
    return Record(request, tuple(values["paraphrase_prompts"]), near)


def _flat_counterfact(values: Mapping[str, Any], where: str) -> Record:
    names = {"prompt": "prompt", "subject": "subject", "target_new": "target"}
    request = request_of({own: values[name] for name, own in names.items()}, where)
    near = Neighbour(values["locality_prompt"], values.get("locality_ground_truth"))
    return Record(request, (values["rephrase_prompt"],), (near,))


def _zsre(values: Mapping[str, Any], where: str) -> Record:
    names = {"src": "prompt", "subject": "subject", "alt": "target"}
    request = request_of({own: values[name] for name, own in names.items()}, where)
    return Record(request, (values["rephrase"],), (Neighbour(values["loc"], values.get("loc_ans")),))
