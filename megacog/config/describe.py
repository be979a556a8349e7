"""The configuration reference in Markdown, from the schema itself: `python -m megacog.config.describe`."""

from __future__ import annotations

import ast
import inspect
import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from megacog.config import schema

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe() -> str:
    """Markdown: one heading with a table of keys for every group of settings, in the schema's order."""
    return "\n".join(_lines(schema.Config, "", None))


def _lines(section: type[schema.Section], path: str, preset: Any) -> Iterator[str]:
    keys = {name: info for name, info in section.model_fields.items() if not _section_of(info.annotation)}
    if keys:
        yield from (f"## `{path}`" if path else "## Top level", "")
        yield from ([" ".join((section.__doc__ or "").split()), ""] if "__doc__" in vars(section) else [])
        if isinstance(preset, schema.Section) and (values := preset.model_dump(mode="json", exclude_defaults=True)):
            yield from (f"Without this section: `{json.dumps(values)}`.", "")
        yield from ("| key | type | default | meaning |", "|---|---|---|---|")
        notes = _field_notes(section)
        yield from (_row(name, info, notes.get(name, "")) for name, info in keys.items())
        yield ""
    for name, info in section.model_fields.items():
        if inner := _section_of(info.annotation):
            items = "[]" if get_origin(info.annotation) is tuple else ""
            yield from _lines(inner, f"{path}.{name}{items}".lstrip("."), info.default)


def _section_of(annotation: Any) -> type[schema.Section] | None:
    choices = (annotation, *get_args(annotation))
    return next((part for part in choices if inspect.isclass(part) and issubclass(part, schema.Section)), None)


def _row(name: str, info: FieldInfo, note: str) -> str:
    bounds = [(sign, getattr(rule, key, None)) for key, sign in _BOUNDS.items() for rule in info.metadata]
    kind = ", ".join([_kind(info.annotation), *(f"{sign} {bound}" for sign, bound in bounds if bound is not None)])
    default = "required" if info.is_required() else f"`{json.dumps(info.get_default(call_default_factory=True))}`"
    return f"| `{name}` | {kind} | {default} | {note} |".replace("  |", " |")


def _field_notes(section: type[schema.Section]) -> dict[str, str]:
    """The string under each field, which Python itself throws away."""
    tree = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(tree, ast.ClassDef)
    notes = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            notes[ast.unparse(field.target)] = " ".join(str(after.value.value).split()).replace("|", "\\|")
    return notes


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in parts)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is tuple:
        return f"list of {_kind(parts[0])}" if parts[-1] is ... else f"[{', '.join(map(_kind, parts))}]"
    names = {str: "text", float: "number", int: "whole number", bool: "true or false", type(None): "null"}
    return names.get(annotation, "section" if origin is dict else str(annotation))


if __name__ == "__main__":
    print(describe(), end="")
