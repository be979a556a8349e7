"""YAML text to plain values with the line of every key, and back.

Differences from PyYAML's own loading, which follows YAML 1.1: `1e-4` is a number, `yes`, `on`, dates and
`1:30` are text, `010` is ten, a key given twice is an error, and anchors, tags and merge keys are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

_MAP, _SEQ = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_NULL, _BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"
_INT, _FLOAT, _STR = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:str"
_MAX_DEPTH = 50
_FLOAT_PATTERN = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT_PATTERN = re.compile(r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)$")


@dataclass
class Parsed:
    """A YAML document as plain values."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)
    """Line (from 1) of the key or item at each path."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """(line, message): keys given twice and the like; `value` holds the rest."""


class _Loader(yaml.SafeLoader):
    """Composes nodes with the scalar rules above; it never constructs objects."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not supported", mark)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, _INT_PATTERN, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes text that either PyYAML or the loader above would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML writes these line breaks unescaped outside double quotes and then reads them as spaces.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar(_STR, text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+0123456789."))
_Dumper.add_implicit_resolver(_INT, _INT_PATTERN, list("-+0123456789"))


def parse(text: str) -> Parsed:
    """Return the plain values of a YAML document.

    Raises:
        yaml.YAMLError: the text is not YAML, or uses anchors or tags.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    parsed = Parsed(None)
    if node is not None:
        parsed.value = _value(node, (), parsed)
    return parsed


def dump(value: Any) -> str:
    """Return YAML text that `parse` reads back as an equal value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def _value(node: yaml.Node, path: Path, parsed: Parsed) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
        return _mapping(node, path, parsed)
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
        items = []
        for index, item in enumerate(node.value):
            parsed.lines[(*path, index)] = item.start_mark.line + 1
            items.append(_value(item, (*path, index), parsed))
        return items
    if isinstance(node, yaml.ScalarNode) and node.tag in (_NULL, _BOOL, _INT, _FLOAT, _STR):
        return _scalar(node)
    raise _refusal(f"the tag {node.tag!r} is not supported", node)


def _mapping(node: yaml.MappingNode, path: Path, parsed: Parsed) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            parsed.problems.append((line, "a key must be a plain word"))
            continue
        key = str(key_node.value)
        inner = (*path, key)
        if key in result:
            dotted = ".".join(map(str, inner))
            parsed.problems.append((line, f"{dotted}: given twice, first in line {parsed.lines[inner]}"))
            continue
        parsed.lines[inner] = line
        result[key] = _value(value_node, inner, parsed)
    return result


def _scalar(node: yaml.ScalarNode) -> Any:
    text = str(node.value)
    if node.tag == _NULL:
        return None
    try:
        if node.tag == _BOOL:
            return {"true": True, "false": False}[text.lower()]
        if node.tag == _INT:
            base = {"0x": 16, "0o": 8}.get(text[:2], 10)
            return int(text, base)
        if node.tag == _FLOAT:
            return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))
    except (KeyError, ValueError):
        kind = node.tag.rsplit(":", 1)[1]
        raise _refusal(f"{text!r} is no {kind}", node) from None
    return text


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
