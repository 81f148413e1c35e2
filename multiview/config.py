"""YAML, key=value overrides and flags into typed dataclasses; OmegaConf does not pass this door."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

Config = TypeVar("Config")


def load_config(
    schema: type[Config], path: Path | str | None = None, overrides: list[str] = (), *, ignored: set[str] = frozenset()
) -> Config:
    """Typed defaults <- YAML (with its `base:` chain) <- `a.b=c` overrides.

    schema: a dataclass type with defaults. ignored: dotted keys of other people's files that have no effect here;
    they are listed in the log and dropped. Raises ValueError for an unknown key (naming its nearest known one) or a
    value of the wrong type, naming the file.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    source = str(path) if path is not None else "command line"
    structured = OmegaConf.structured(schema)
    known = _known_keys(schema)
    try:
        given = _read_yaml_chain(Path(path)) if path is not None else OmegaConf.create()
        for override in overrides:
            if "=" not in override:
                raise ValueError(f"override {override!r} must look like key=value")
        dotlist = OmegaConf.from_dotlist(list(overrides))
        for tree, where in ((given, source), (dotlist, "command line")):
            _drop_ignored(tree, ignored, where)
            _check_keys(OmegaConf.to_container(tree, resolve=False), known, where)
        return OmegaConf.to_object(OmegaConf.merge(structured, given, dotlist))
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {str(error).strip().splitlines()[0]} (key {error.full_key})") from error


def config_to_dict(config: object) -> dict:
    """The resolved configuration as plain JSON values."""
    return dataclasses.asdict(config)


def config_to_yaml(config: object) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def _read_yaml_chain(path: Path) -> Any:
    """The YAML merged over the files its `base:` names (relative to it)."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if not path.is_file():
        raise ValueError(f"config {path} does not exist")
    try:
        content = OmegaConf.load(path)
    except YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(content):
        raise ValueError(f"config {path} must hold a mapping of keys to values")
    base = content.pop("base", None)
    return OmegaConf.merge(_read_yaml_chain(path.parent / base), content) if base else content


def _known_keys(schema: type, prefix: str = "") -> set[str]:
    """All dotted keys of a dataclass type; a key whose value is a free mapping ends with '.*'."""
    hints = typing.get_type_hints(schema)
    keys = set()
    for entry in dataclasses.fields(schema):
        name, kind = prefix + entry.name, hints[entry.name]
        keys.add(name)
        if dataclasses.is_dataclass(kind):
            keys |= _known_keys(kind, name + ".")
        elif any(part is dict or typing.get_origin(part) is dict for part in (kind, *typing.get_args(kind))):
            keys.add(name + ".*")
    return keys


def _check_keys(content: dict, known: set[str], source: str, prefix: str = "") -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            leaf = [k for k in known if k.rsplit(".", 1)[-1] == str(key)]
            raise ValueError(f"{source}: unknown key '{name}'; the nearest known one is '{(leaf or nearest)[0]}'")
        if not isinstance(value, dict | None) and any(other.startswith(name + ".") for other in known):
            raise ValueError(f"{source}: key '{name}' must hold a mapping of keys to values, got {value!r}")
        if isinstance(value, dict) and name + ".*" not in known:
            _check_keys(value, known, source, name + ".")


def _drop_ignored(tree: Any, ignored: set[str], source: str) -> None:
    from omegaconf import OmegaConf

    for name in sorted(ignored):
        parent, _, key = name.rpartition(".")
        node = OmegaConf.select(tree, parent) if parent else tree
        if OmegaConf.is_dict(node) and key in node:  # also where its value is null
            del node[key]
            log.info("%s: key '%s' has no effect here and is ignored", source, name)


# ---- settings of a script: default, help and check said once --------------------------------------------------------


def option(default: Any, help: str, *, choices: tuple | None = None, least: float | None = None, metavar: str = ""):
    """Returns a dataclass field that `add_fields` makes a flag of. default: ... if required. least: of a number."""
    metadata = {"help": help, "choices": choices, "least": least, "metavar": metavar}
    return dataclasses.field(default=dataclasses.MISSING if default is ... else default, metadata=metadata)


def add_fields(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds one flag per `option` field of a dataclass; `parser` may be a group of one.

    bool becomes --name / --no-name; a tuple takes its values after one flag; what has no default value is required.
    Imports nothing heavy, so that --help answers at once.
    """
    hints = typing.get_type_hints(settings)
    for entry in dataclasses.fields(settings):
        if "help" not in entry.metadata:
            continue
        kind, many = _flag_type(hints[entry.name])
        default = None if entry.default is dataclasses.MISSING else entry.default
        words: dict[str, Any] = {"help": entry.metadata["help"], "default": default}
        if entry.default is dataclasses.MISSING:
            words |= {"required": True}
        if kind is bool:
            words |= {"action": argparse.BooleanOptionalAction}
        else:
            words |= {"type": checked(kind, entry.metadata["least"]), "choices": entry.metadata["choices"]}
            words |= {"nargs": "*"} if many else {}
            words |= {"metavar": entry.metadata["metavar"]} if entry.metadata["metavar"] else {}
        parser.add_argument(f"--{entry.name}", **words)


def from_arguments(settings: type[Config], arguments: argparse.Namespace) -> Config:
    """Returns the dataclass filled from parsed arguments; its __post_init__ checks what concerns several of them."""
    flags = [entry.name for entry in dataclasses.fields(settings) if "help" in entry.metadata]
    values = {name: getattr(arguments, name) for name in flags}
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _flag_type(hint: Any) -> tuple[type, bool]:
    """Returns the type of a field's value (`float | None` -> float), and whether the field holds several."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _flag_type(parts[0])
    if typing.get_origin(hint) is tuple:
        return parts[0], True
    return hint, False


def checked(kind: type, least: float | None):
    """Returns an argparse type that refuses numbers below `least` and such as are not finite."""

    def convert(text: str):
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its message
    return convert
