"""From YAML and `key.sub=value` overrides to one checked `Config`, and back to YAML.

Every setting of every layer is first turned into `(dotted key, value)`, so that a file and the command line are checked by
the same code and every error can name the layer that it came from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_r1.config.keys import FIELDS, FREE_FORM, SECTIONS, nearest_key
from megatron_r1.config.schema import Config
from megatron_r1.config.yaml_text import MOST_CHARACTERS, read_yaml
from megatron_r1.errors import ConfigError, one_line

COMMAND_LINE = "on the command line"
_LONGEST_SHOWN = 200  # characters of a value in a message


def load_config(path: Path | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> Config:
    """Merge, from weakest to strongest: the schema's defaults, `defaults`, the YAML file, the overrides.

    Raises ConfigError with one line that names the key and the layer: a missing or malformed file, an unknown key (with
    the nearest known one), a value of the wrong type or out of range.
    """
    layers: list[tuple[str, list[tuple[str, Any]]]] = [("in the defaults", list(_flatten_settings(defaults or {})))]
    if path is not None:
        layers.append((f"in {path}", list(_flatten_settings(_read_yaml(path)))))
    layers.append((COMMAND_LINE, [setting for text in overrides for setting in _parse_override(text)]))

    tree = Config().model_dump()
    sources: dict[str, str] = {}
    for source, settings in layers:
        for key, value in settings:
            _check_key(key, value, source)
            _set(tree, key, _with_home(value))
            sources[key] = source
    try:
        return Config.model_validate(tree, strict=True)
    except ValidationError as error:
        raise ConfigError(_describe_problem(error, sources)) from None


def override_config(config: Config, settings: Mapping[str, Any], source: str) -> Config:
    """The config with some settings replaced: sections as mappings, or dotted keys.

    Args:
        source: where they stand, for messages.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of range.
    """
    tree = config.model_dump()
    for key, value in _flatten_settings(settings):
        _check_key(key, value, source)
        _set(tree, key, value)
    try:
        return Config.model_validate(tree, strict=True)
    except ValidationError as error:
        raise ConfigError(_describe_problem(error, {key: source for key, _ in _flatten_settings(settings)})) from None


def dump(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: Path) -> None:
    """Write `dump(config)`; a killed process leaves the old file or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(dump(config), encoding="utf-8")
    temporary.replace(path)


def flatten_config(config: Config) -> dict[str, Any]:
    """Dotted key -> value for every setting, in the order of the schema."""
    return dict(_flatten_settings(config.model_dump()))


def _flatten_settings(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in SECTIONS and isinstance(value, Mapping):
            yield from _flatten_settings(value, f"{key}.")
        elif key not in SECTIONS or value is not None:  # a section whose lines are all commented out changes nothing
            yield key, value


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)  # of a device there would be no end
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {one_line(error)}") from None
    content = read_yaml(text, f"config file {path}")
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"config file {path} holds a {type(content).__name__}, expected 'key: value' lines")
    return content


def _parse_override(text: str) -> Iterator[tuple[str, Any]]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{text}' {COMMAND_LINE} is not of the form key.sub=value")
    # ` #` begins a comment in a file; on the command line it is part of the value, such as the name of a folder.
    is_plain = " #" in value and value.lstrip()[:1] not in ("'", '"', "[", "{")
    parsed = value if is_plain else read_yaml(value, f"the value of '{key}' {COMMAND_LINE}")
    if key in SECTIONS and isinstance(parsed, Mapping):
        return _flatten_settings(parsed, f"{key}.")
    return iter([(key, parsed)])


def _check_key(key: str, value: Any, source: str) -> None:
    if key in SECTIONS:
        raise ConfigError(f"'{key}' {source} is a section, got {_shown(value)}, expected settings such as '{_example_key(key)}'")
    if key not in FIELDS and not any(key.startswith(f"{free}.") for free in FREE_FORM):
        key = " ".join(key[:_LONGEST_SHOWN].split())
        raise ConfigError(f"unknown key '{key}' {source}; the nearest known key is '{nearest_key(key)}'")


def _with_home(value: Any) -> Any:
    """Texts that begin with ~/, as paths do, with the home folder in its place; no shell reads them."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(value, list):
        return [_with_home(entry) for entry in value]
    return {name: _with_home(entry) for name, entry in value.items()} if isinstance(value, dict) else value


def _example_key(section: str) -> str:
    return next(key for key in FIELDS if key.startswith(f"{section}.") and key not in SECTIONS)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[name] = value


def _describe_problem(error: ValidationError, sources: Mapping[str, str]) -> str:
    """The first problem of `error` on one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    source = next((source for known, source in sources.items() if key == known or key.startswith(f"{known}.")), COMMAND_LINE)
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"'{key}' {source} is {_shown(first['input'])}, expected {expected}"


def _shown(value: Any) -> str:
    """A value for a message; of a long one, the beginning."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
