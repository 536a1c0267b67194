"""Settings as text: from YAML files and typed options to the sections of `wsimil.config`, and back.

- A key is `section.key` in YAML (`tile: {tile_px: 224}`) and `--section.key` on the command line; the short form (`--tile-px`, or
  `tile_px:` at the top of a YAML file) sets the key in every section that has it.
- Hyphens and underscores are the same; an unknown key or a value of the wrong kind is an error that names the nearest key.
- Options of an aggregator's or objective's own are checked against the annotations of its class.
- No torch here: `wsimil --help` reads this module.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from wsimil.config import SECTIONS, Range, Settings, normalise_key
from wsimil.errors import ConfigError
from wsimil.files import write_text

__all__ = ["as_mapping", "checked_options", "keys_of", "nearest", "read_settings", "save_settings", "to_yaml"]


def keys_of(sections: Iterable[str]) -> dict[str, list[str]]:
    """Every accepted key of these sections → the full keys it sets (a short key may set several)."""
    keys: dict[str, list[str]] = {}
    for section in sections:
        for setting in dataclasses.fields(SECTIONS[section]):
            full = f"{section}.{setting.name}"
            keys.setdefault(full, []).append(full)
            keys.setdefault(setting.name, []).append(full)
    return keys


def read_settings(
    sections: Iterable[str],
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    defaults: Settings | None = None,
) -> Settings:
    """Defaults, then the YAML file, then the overrides (key → value, or text as typed).

    Raises:
        ConfigError: unknown key (the nearest is named), wrong kind of value, value out of range.
    """
    sections = list(sections)
    keys = keys_of(sections)
    flat: dict[str, Any] = {}
    # in each source a full key beats a short one, whatever the order
    for source, mapping in ((str(config), _read_yaml(config) if config else {}), ("", _flatten(overrides or {}, sections))):
        for full_first in (False, True):
            for key, value in mapping.items():
                if ("." in key) is full_first:
                    if source and key not in keys and key in keys_of(SECTIONS):
                        continue  # one file may serve every stage: another stage's key is no mistake
                    for full in _resolve(key, keys, source):
                        flat[full] = value
    settings = defaults or Settings()
    for section in sections:
        changes = {key.split(".")[1]: value for key, value in flat.items() if key.split(".")[0] == section}
        if changes:
            hints = typing.get_type_hints(SECTIONS[section])
            typed = {name: _coerce(hints[name], value, f"{section}.{name}") for name, value in changes.items()}
            settings = dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **typed)})
    return settings


def nearest(key: str, keys: Iterable[str]) -> str:
    """`; did you mean …?` or nothing."""
    matches = difflib.get_close_matches(key, list(keys), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def _resolve(key: str, keys: Mapping[str, list[str]], source: str) -> list[str]:
    if key in keys:
        return keys[key]
    where = f"{source}: " if source else ""
    raise ConfigError(f"{where}unknown key {key}{nearest(key, [*keys, *SECTIONS])}")


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, one would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = normalise_key(str(self.construct_object(key_node, deep=True)))
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, for example `tile: {{mpp: 0.5}}`")
    return _flatten(content, SECTIONS)


def _flatten(content: Mapping[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        key = normalise_key(str(key))
        if key in sections and isinstance(value, Mapping):
            inside = {f"{key}.{normalise_key(str(inner))}": inner_value for inner, inner_value in value.items()}
            if twice := sorted(flat.keys() & inside.keys()):
                raise ConfigError(f"{twice[0]} is set twice; keep one")
            flat |= inside
        elif key in sections and value is None:
            continue
        elif key in flat:
            raise ConfigError(f"{key} is set twice; keep one")
        elif key in sections:
            raise ConfigError(f"{key} is {value!r}; expected keys and values, for example `{key}: {{…}}`")
        else:
            flat[key] = value
    return flat


def _coerce(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`; text is read as YAML reads it, so `--lr 3e-4` and `lr: 3e-4` mean the same."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = _coerce(arguments[0], value, key)
        for limits in arguments[1:]:
            if value not in limits:
                raise ConfigError(f"{key} is {value}; expected {limits}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return _coerce(next(part for part in arguments if part is not type(None)), value, key)
    if origin is tuple:
        if isinstance(value, Mapping) and key.endswith("_options"):  # `aggregator_options: {k: 8}`
            value = [f"{name}={'null' if inner is None else inner}" for name, inner in value.items()]
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise ConfigError(f"{key} is {value!r}; expected a list")
        return tuple(_coerce(arguments[0], item, key) for item in values)
    if origin is Literal:
        text = str(value)
        if isinstance(value, bool) and "on" in arguments:  # YAML's own reading of on and off
            text = "on" if value else "off"
        if text not in arguments:
            raise ConfigError(f"{key} is {text!r}; expected one of {', '.join(arguments)}")
        return text
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false", "yes", "no"):
            raise ConfigError(f"{key} is {value!r}; expected true or false")
        return text in ("true", "yes")
    if kind is str:
        if isinstance(value, bool):
            raise ConfigError(f"{key} is {value}; expected text (YAML reads yes, no, on, off as true or false: use quotes)")
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{key} is {value!r}; expected text")
        return str(value)
    try:
        if isinstance(value, bool) or "_" in str(value):  # Python reads 0_5 as 5
            raise ValueError
        number = float(value)
        if kind is int:
            if number != int(number):
                raise ValueError
            return int(number)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        expected = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{key} is {value!r}; expected {expected}") from None


def checked_options(make: Callable[..., Any], options: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Options for a class (or a partial of it) as its annotations want them: kinds as in a section, and within their `Range`.

    Whole numbers are sizes and counts: without a `Range` they are at least 1. An option that the class does not have is left for it
    to refuse.

    Raises:
        ConfigError: naming the option, its value and what is expected.
    """
    while isinstance(make, functools.partial):
        make = make.func
    checked = dict(options)
    hints = typing.get_type_hints(make.__init__, include_extras=True)
    for name in hints.keys() & options.keys():
        hint = hints[name]
        value = checked[name] = _coerce(hint, options[name], f"{whose}: {name}")
        if hint in (int, int | None) and value is not None and value not in Range(1):
            raise ConfigError(f"{whose}: {name} is {value}; expected {Range(1)}")
    return checked


def as_mapping(settings: Settings, sections: Iterable[str]) -> dict[str, Any]:
    """Plain nested values, as they stand in YAML."""
    return {
        section: {
            key: list(value) if isinstance(value, tuple) else value for key, value in vars(getattr(settings, section)).items()
        }
        for section in sections
    }


def to_yaml(settings: Settings, sections: Iterable[str]) -> str:
    return yaml.safe_dump(as_mapping(settings, sections), sort_keys=False, allow_unicode=True)


def save_settings(path: Path, settings: Settings, sections: Iterable[str]) -> None:
    """Write the resolved settings; the file is a valid `--config`."""
    write_text(path, to_yaml(settings, sections))
