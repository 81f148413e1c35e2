"""YAML, key=value overrides and flags into typed dataclasses; OmegaConf does not pass this door."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import io
import logging
import math
import socket
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from multiview.files import read_text, take

log = logging.getLogger(__name__)

YAML_LIMIT = 1 << 20  # characters
Config = TypeVar("Config")


def load_config(
    schema: type[Config], path: Path | str | None = None, overrides: list[str] = (), *, ignored: set[str] = frozenset()
) -> Config:
    """Typed defaults (schema, a dataclass type) <- YAML (with its `base:` chain) <- `a.b=c` overrides. ignored: dotted
    keys that have no effect here, logged and dropped. Text stays as typed where the schema says str: YAML would read
    2024_06_01 as a number. Raises ValueError naming the file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    source, kinds, trees = str(path or "command line"), _kinds_of_keys(schema), []
    texts = {name for name, kind in kinds.items() if kind == "text"}  # YAML's guesses are not asked for these
    while path:  # a chain, and no tree: a delta names one file, relative to it
        content = read_yaml(path, texts | {"base"})
        if len(trees) > 10:  # the shipped ones have two
            raise ValueError(f"config {path}: its chain of `base:` files is longer than 10; does it name itself?")
        base = take(content, "base", str, str(path), default=None)
        content.pop("base", None)
        trees.insert(0, (str(path), content))
        path = Path(path).parent / base if base else None
    for override in overrides:
        key, equals, typed = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must look like key=value")
        value: Any = None if typed in ("null", "~") else typed  # the only two words that stay YAML's
        try:
            if key not in texts or typed[:1] in ("'", '"', "["):  # quotes and lists are YAML on purpose
                trees.append(("command line", OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
                continue
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"override {override!r} cannot be read: {' '.join(str(error).split())}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        trees.append(("command line", value))
    try:
        for where, tree in trees:
            _check_keys(tree, kinds, ignored, where)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *(tree for _, tree in trees)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {str(error).strip().splitlines()[0]} (key {error.full_key})") from error
    except ValueError as error:  # a section's own check names its key alone
        named = str(error).startswith((source, "command line"))
        raise ValueError(str(error) if named else f"{source}: {error}") from None


def config_to_yaml(config: object) -> str:
    """Returns the resolved configuration as YAML, which `load_config` reads again."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def read_yaml(path: Path | str, texts: set[str] = frozenset()) -> dict:
    """Returns a YAML file's mapping as plain values. texts: dotted keys whose values stay as typed. Raises ValueError
    naming the file, also for deep nesting and heaps of aliases (a few lines unfold to gigabytes)."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text, depth, aliases = read_text(path), 0, 0
    try:
        if len(text) > YAML_LIMIT:
            raise ValueError(f"it has {len(text)} characters, {YAML_LIMIT} are the limit")
        for event in yaml.parse(text):  # events do not unfold: this is cheap for any file
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > 30 or aliases > 16:
                raise ValueError("it nests deeper than 30 levels, or has more than 16 aliases")
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
        written = yaml.BaseLoader(text).get_single_data()  # every scalar as it was typed
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    _keep_text(content, written if isinstance(written, dict) else {}, texts)
    return content


def _keep_text(values: dict, written: dict, texts: set[str], prefix: str = "") -> None:
    for key, value in values.items():
        typed = written.get(str(key))
        if isinstance(value, dict) and isinstance(typed, dict):
            _keep_text(value, typed, texts, f"{prefix}{key}.")
        elif f"{prefix}{key}" in texts and isinstance(value, list) and isinstance(typed, list):
            values[key] = [t if isinstance(t, str) and v is not None else v for v, t in zip(value, typed)]
        elif f"{prefix}{key}" in texts and value is not None and isinstance(typed, str):
            values[key] = typed


def _kinds_of_keys(schema: type, prefix: str = "") -> dict[str, str]:
    """Returns all dotted keys of a dataclass type, each a `section`, `mapping` (of free keys), `text` or `value`."""
    kinds, hints = {}, typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        name, kind = prefix + entry.name, hints[entry.name]
        parts = {kind, *typing.get_args(kind)}
        parts |= {typing.get_origin(part) for part in parts}  # str | None, list[str], Literal["a", "b"]
        if dataclasses.is_dataclass(kind):
            kinds |= {name: "section", **_kinds_of_keys(kind, name + ".")}
        elif dict in parts:
            kinds[name] = "mapping"
        else:
            texts = any(part in (str, Path) or isinstance(part, str) for part in parts)
            kinds[name] = "text" if texts and not parts & {int, float, bool} else "value"
    return kinds


def _check_keys(content: dict, kinds: dict[str, str], ignored: set[str], source: str, prefix: str = "") -> None:
    """Drops the ignored keys, and raises ValueError for any that the schema does not know."""
    for key, value in list(content.items()):
        name = f"{prefix}{key}"
        if name in ignored:  # also where its value is null
            del content[key]
            log.info("%s: key '%s' has no effect here and is ignored", source, name)
            continue
        if name not in kinds:
            nearest = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)
            # A key at the wrong depth is the commonest mistake: its name is nearer than any spelling.
            leaf = [known for known in kinds if known.rsplit(".", 1)[-1] == str(key)]
            raise ValueError(f"{source}: unknown key '{name}'; the nearest known one is '{(leaf or nearest)[0]}'")
        if kinds[name] == "section" and not isinstance(value, dict | None):
            raise ValueError(f"{source}: key '{name}' must hold a mapping of keys to values, got {value!r}")
        if kinds[name] != "mapping" and isinstance(value, dict):
            _check_keys(value, kinds, ignored, source, name + ".")


class Parser(argparse.ArgumentParser):
    """Every script's parser: --version, and a mistake told in one line without the usage; its exit code stays 2."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_argument("--version", action="version", help="show version and commit, and stop")

    @property
    def version(self) -> str:
        from multiview import __version__
        from multiview.run import git_hash

        return f"{__version__} (commit {git_hash()})"

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def training_arguments(about: str, schema: str, example: str) -> argparse.Namespace:
    """Parses the command line that both trainings have: config, data, overfit, dry_run, overrides."""
    parser = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="F", help=f"YAML over the defaults of {schema}")
    told = "dataset folder to train on: its lists, all its views, its prompts, and a run folder named after it"
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"{told} (default: what the config names)")
    parser.add_argument(
        "--overfit", type=checked(int, least=0), default=0, metavar="N",
        help="train and validate on the first N samples: the first test of any set-up (default: 0, off)",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the resolved config and stop (default: off)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"e.g. {example}")
    arguments = parser.parse_intermixed_args()
    for override in arguments.overrides:
        if "=" not in override:
            parser.error(f"expected key=value, got {override!r}")
    return arguments


def option(
    default: Any, help: str, *, choices: tuple | None = None, least: float | None = None, most: float | None = None,
    metavar: str | tuple[str, ...] = "",
):  # fmt: skip
    """Returns a dataclass field that `add_fields` makes a flag of. default: ... if required. least, most: limits."""
    metadata = {"help": help, "choices": choices, "limits": (least, most), "metavar": metavar}
    return dataclasses.field(default=dataclasses.MISSING if default is ... else default, metadata=metadata)


def add_fields(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds one flag per `option` field of a dataclass; `parser` may be a group of one. bool becomes --name / --no-name;
    a tuple takes its values after one flag (`tuple[int, ...]` any number, `tuple[int, int]` two). Imports nothing
    heavy."""
    hints = typing.get_type_hints(settings)
    for entry in dataclasses.fields(settings):
        if "help" not in entry.metadata:
            continue
        kind, many = _flag_type(hints[entry.name])
        is_required = entry.default is dataclasses.MISSING
        words: dict[str, Any] = {"help": entry.metadata["help"], "default": None if is_required else entry.default}
        words |= {"required": True} if is_required else {}
        if kind is bool:
            words |= {"action": argparse.BooleanOptionalAction}
        else:
            words |= {"type": checked(kind, *entry.metadata["limits"]), "choices": entry.metadata["choices"]}
            words |= {"nargs": many} if many else {}
            words |= {"metavar": entry.metadata["metavar"]} if entry.metadata["metavar"] else {}
        parser.add_argument(f"--{entry.name}", **words)


def from_arguments(settings: type[Config], arguments: argparse.Namespace) -> Config:
    """Returns the dataclass filled from parsed arguments; its __post_init__ checks what concerns several of them."""
    flags = [entry.name for entry in dataclasses.fields(settings) if "help" in entry.metadata]
    values = {name: getattr(arguments, name) for name in flags}
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _flag_type(hint: Any) -> tuple[type, int | str | None]:
    """Returns the type of a field's value (`float | None` -> float), and argparse's nargs where it holds several."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _flag_type(parts[0])
    if typing.get_origin(hint) is tuple:
        return parts[0], "*" if Ellipsis in parts else len(parts)
    return hint, None


def server_library(library: str, host: str, port: int) -> types.ModuleType:
    """Imports a library of requirements-extra.txt that is to serve host:port. Raises ValueError where it is not
    installed, and where the port is taken, instead of which it would choose another."""
    try:
        socket.create_server((host, port)).close()
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"{library} is not installed ({error}): pip install -r requirements-extra.txt") from error
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be served ({error.strerror}): choose another --port") from error


def checked(kind: type, least: float | None = None, most: float | None = None):
    """Returns an argparse type that refuses numbers below `least`, above `most` and such as are not finite."""

    def convert(text: str):
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its message
    return convert
