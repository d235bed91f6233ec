"""YAML of people and files, read within bounds: no tags that run code, no repeated keys, no alias that grows."""

from __future__ import annotations

from typing import Any

import yaml

#: Bytes of a file, characters of one value, levels of nesting, and nodes once aliases stand for what they repeat.
MAX_BYTES, MAX_SCALAR, MAX_DEPTH, MAX_NODES = 2**20, 4096, 32, 10_000


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of a silent overwrite, and whose size is bounded."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels deep in line {line}; nest less")
        before = self._nodes
        alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise yaml.YAMLError(f"an alias in line {line} stands inside what it repeats; write the values out")
        # An alias counts as often as it is used, as everything that reads the values would meet it.
        self._nodes = before + self._sizes[id(node)] if alias else self._nodes + 1
        if self._nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES:,} values, aliases counted as what they repeat; shorten it")
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_SCALAR:
            raise yaml.YAMLError(f"a value of more than {MAX_SCALAR:,} characters in line {line}; shorten it")
        self._sizes[id(node)] = self._nodes - before
        return node


def _unique_mapping(loader: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.YAMLError(f"key {key!r} in line {key_node.start_mark.line + 1} is not text")
        if key in seen:
            raise yaml.YAMLError(f"key {key!r} stands twice, again in line {key_node.start_mark.line + 1}; keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep)  # type: ignore[no-any-return]


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_yaml(text: str) -> Any:
    """The values of one YAML document.

    Raises:
        yaml.YAMLError: not YAML, a tag other than the plain ones, a repeated key, or more than the bounds allow.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    # PyYAML's constructors of dates, numbers and tagged scalars let these out.
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise yaml.YAMLError(f"a value that can't be read ({type(error).__name__}: {error})") from error
