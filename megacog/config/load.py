"""From a YAML file and `key=value` overrides to a checked configuration.

All errors come at once, each with its place (file and line, or the override), the key and how to mend it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megacog.config import deepspeed_keys, yaml_text
from megacog.config.generation import GenerationConfig
from megacog.config.schema import Config
from megacog.errors import ConfigError

SectionT = TypeVar("SectionT", bound=BaseModel)
_MAX_BYTES = 1 << 20
_MAX_SHOWN = 60


@dataclass
class _Source:
    """Values together with the place that each came from."""

    values: dict[str, Any]
    places: dict[yaml_text.Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: yaml_text.Path) -> str:
        """Return where the value at `path`, or the nearest section around it, was written."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, "configuration")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file with `section.key=value` overrides applied.

    Raises:
        ConfigError: the file is missing or not YAML, or keys or values are wrong: all of them in one message.
    """
    path = Path(path)
    source = _read_file(path)
    for override in overrides:
        _apply(source, override, prefix="", schema=Config)
    config = _validate(Config, source, prefix="")
    assert isinstance(config, Config)
    return config


def apply_overrides(section: SectionT, overrides: Sequence[str], prefix: str) -> SectionT:
    """Return a section (e.g. the `generation` one) with `key=value` or `prefix.key=value` overrides applied.

    A preset among the overrides replaces what the section says of its keys.

    Raises:
        ConfigError: as `load_config`.
    """
    source = _Source(section.model_dump(mode="json"))
    for override in overrides:
        _apply(source, override, prefix, type(section))
    if isinstance(section, GenerationConfig):
        given = {key: value for key, value in source.values.items() if (key,) in source.places}
        for key in section.replaced_by(given):
            del source.values[key]
    return _validate(type(section), source, prefix)


def dump_config(config: BaseModel) -> str:
    """Return the configuration as YAML with every key; `load_config` reads it back as an equal one."""
    return yaml_text.dump(config.model_dump(mode="json"))


def config_hash(config: BaseModel) -> str:
    """Return the sha256, in hexadecimal, of every resolved value."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_file(path: Path) -> _Source:
    parsed = _parse_file(path)
    if not isinstance(parsed.value, dict):
        found = _show(parsed.value)
        raise ConfigError(f"{path}: expected sections with keys (model:, train:, ...), found {found}")
    places = {key: f"{path}:{line}" for key, line in parsed.lines.items()}
    places[()] = str(path)
    return _Source(parsed.value, places, [f"{path}:{line}: {text}" for line, text in parsed.problems])


def _parse_file(path: Path) -> yaml_text.Parsed:
    if not path.is_file():
        raise ConfigError(_describe_missing(path))
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ConfigError(f"{path}: {size} bytes; a configuration has at most {_MAX_BYTES} bytes")
        return yaml_text.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _describe_missing(path: Path) -> str:
    if path.is_dir():
        return f"{path}: is a folder; name the YAML file inside it"
    siblings = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), siblings, n=3)
    return f"{path}: no such configuration file" + (f"; did you mean {', '.join(close)}?" if close else "")


def _apply(source: _Source, override: str, prefix: str, schema: type[BaseModel]) -> None:
    place = f"override {override!r}"
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        source.problems.append(f"{place}: write it as section.key=value")
        return
    if prefix and len(keys) > 1 and keys[0] == prefix:
        keys = keys[1:]
    try:
        value = _override_value(text, _annotation_at(schema, keys))
        _set(source, keys, value, place)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        source.problems.append(f"{place}: the value is not valid YAML: {problem}")
    except LookupError as error:
        source.problems.append(f"{place}: {error.args[0]}")


def _override_value(text: str, annotation: Any) -> Any:
    parsed = yaml_text.parse(text)
    if parsed.problems:
        raise yaml.YAMLError(parsed.problems[0][1])
    if _strip_optional(annotation) is str and parsed.value is not None and not isinstance(parsed.value, str):
        return text.strip()  # run_dir=2024 is a name, not a number
    return parsed.value


def _set(source: _Source, keys: tuple[str, ...], value: Any, place: str) -> None:
    """Put `value` at a dotted key, making missing sections on the way.

    Raises:
        LookupError: the way leads through a value that holds no keys.
    """
    here: Any = source.values
    path: yaml_text.Path = ()
    for depth, key in enumerate(keys):
        step = _step(here, key, ".".join(keys[:depth]))
        path = (*path, step)
        if depth == len(keys) - 1:
            here[step] = value
            for inner in [known for known in source.places if known[: len(path)] == path]:
                del source.places[inner]
            source.places[path] = place
        else:
            if isinstance(here, dict) and here.get(step) is None:
                here[step] = {}
                source.places[path] = place
            here = here[step]


def _step(here: Any, key: str, above: str) -> str | int:
    if isinstance(here, dict):
        return key
    if isinstance(here, list):
        if key.isdigit() and int(key) < len(here):
            return int(key)
        raise LookupError(f"{above} is a list of {len(here)}; use an index from 0 or set the whole list")
    raise LookupError(f"{above} is a single value and has no keys")


def _validate(schema: type[SectionT], source: _Source, prefix: str) -> SectionT:
    problems = list(source.problems)
    section: SectionT | None = None
    try:
        # The JSON mode is strict about types (true is no number, 3 no text) yet takes lists for tuples.
        text = json.dumps(source.values, ensure_ascii=True)
        section = schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems += _translate(error, schema, source, prefix)
    if schema is Config and isinstance(source.values.get("deepspeed"), dict):
        problems += _check_deepspeed(source)
    if problems:
        raise ConfigError(_join(problems))
    assert section is not None
    return section


def _join(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  {line}" for line in problems)


def _check_deepspeed(source: _Source) -> Iterator[str]:
    for inner, text in deepspeed_keys.problems(source.values["deepspeed"]):
        path = ("deepspeed", *inner)
        yield f"{source.place(path)}: {'.'.join(path)}: {text}"


def _translate(
    error: ValidationError, schema: type[BaseModel], source: _Source, prefix: str
) -> Iterator[str]:
    """Yield one line per wrong key or value; the branches of a union count as one."""
    seen: set[yaml_text.Path] = set()
    for detail in error.errors(include_url=False):
        path = _real_path(detail["loc"], source.values, missing=detail["type"] == "missing")
        if path in seen and detail["type"] != "value_error":
            continue
        seen.add(path)
        dotted = ".".join(map(str, ((prefix,) if prefix else ()) + path))
        name = f"{dotted}: " if dotted else ""
        yield f"{source.place(path)}: {name}{_explain(dict(detail), path, schema)}"


def _real_path(loc: tuple[str | int, ...], values: Any, missing: bool) -> yaml_text.Path:
    """Return the part of pydantic's location that names keys, without its names for union branches."""
    path: yaml_text.Path = ()
    here = values
    for index, key in enumerate(loc):
        if isinstance(here, dict) and (key in here or (missing and index == len(loc) - 1)):
            here = here.get(str(key))
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):
            here = here[key]
        else:
            break
        path = (*path, key)
    return path


def _explain(detail: dict[str, Any], path: yaml_text.Path, schema: type[BaseModel]) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return "unknown key" + _suggest(path, schema)
    if kind == "missing" and isinstance(detail["loc"][-1], int):  # an item of a tuple
        items = [item for item in get_args(_strip_optional(_annotation_at(schema, path))) if item is not ...]
        return f"expected {len(items)} values, got {_show(value)}"
    if kind == "missing":
        return f"missing; it is required{_describe_field(path, schema)}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    choices = _choices(_annotation_at(schema, path))
    if choices:
        close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"expected one of {', '.join(map(_plain, choices))}, got {_show(value)}{hint}"
    if kind in ("too_long", "too_short"):
        length = detail["ctx"].get("max_length", detail["ctx"].get("min_length"))
        return f"expected {length} values, got {_show(value)}"
    message = str(detail["msg"]).removeprefix("Input ").removeprefix("should be ")
    hint = " (write true or false)" if kind in ("bool_type", "bool_parsing") else ""
    return f"expected {message[0].lower()}{message[1:]}{hint}, got {_show(value)}"


def _describe_field(path: yaml_text.Path, schema: type[BaseModel]) -> str:
    annotation = _annotation_at(schema, path)
    if _is_section(annotation):
        keys = list(annotation.model_fields)
        return f" (a section with {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''})"
    return f" ({getattr(annotation, '__name__', None) or str(annotation).replace('typing.', '')})"


def _suggest(path: yaml_text.Path, schema: type[BaseModel]) -> str:
    """Return the closest known keys: of the same section first, then of the whole configuration."""
    parent = _annotation_at(schema, path[:-1]) if path[:-1] else schema
    name = str(path[-1])
    own = list(parent.model_fields) if _is_section(parent) else []
    close = difflib.get_close_matches(name, own, n=3)
    if not close:
        everywhere = list(_dotted_keys(schema, ""))
        same_name = [key for key in everywhere if key.rsplit(".", 1)[-1] == name]
        dotted = ".".join(map(str, path))
        close = same_name or difflib.get_close_matches(dotted, everywhere, n=3)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known keys here: {', '.join(own)}" if own else ""


def _dotted_keys(schema: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in schema.model_fields.items():
        yield prefix + name
        annotation = _strip_optional(info.annotation)
        if _is_section(annotation):
            yield from _dotted_keys(annotation, f"{prefix}{name}.")


def _annotation_at(schema: type[BaseModel], path: Sequence[str | int]) -> Any:
    """Return the type at a path, or None where the schema has no such key."""
    here: Any = schema
    for key in path:
        here = _strip_optional(here)
        if _is_section(here):
            info = here.model_fields.get(str(key))
            here = info.annotation if info is not None else None
        elif get_origin(here) in (tuple, list) and str(key).isdigit():
            arguments = [argument for argument in get_args(here) if argument is not Ellipsis]
            here = arguments[min(int(key), len(arguments) - 1)]
        else:
            return None
    return here


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (types.UnionType, typing.Union):
        members = get_args(annotation)
        found = [choice for member in members for choice in _choices(member)]
        plain = [member for member in members if member is not type(None) and not _choices(member)]
        return found if not plain else []
    return []


def _strip_optional(annotation: Any) -> Any:
    if get_origin(annotation) in (types.UnionType, typing.Union):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return members[0]
    return annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a section with {', '.join(map(str, list(value)[:4])) or 'no keys'}"
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
