"""YAML and key=value overrides into typed dataclasses; OmegaConf does not pass this door."""

from __future__ import annotations

import dataclasses
import difflib
import logging
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
    import typing

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
