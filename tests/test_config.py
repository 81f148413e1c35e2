"""The doors where YAML, overrides and flags become typed objects."""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from multiview.config import add_fields, from_arguments, load_config, option


@dataclass
class Optimizer:
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])


@dataclass
class Settings:
    steps: int = 10
    mode: Literal["a", "b"] = "a"
    optimizer: Optimizer = field(default_factory=Optimizer)
    names: list[str] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)
    maybe: str | None = None


def test_defaults_then_base_then_yaml_then_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("steps: 20\noptimizer: {lr: 3e-4}\n")
    (tmp_path / "delta.yaml").write_text("base: base.yaml\nmode: b\nextra: {x: 1.5}\n")
    settings = load_config(Settings, tmp_path / "delta.yaml", ["optimizer.betas=[0.5,0.6]", "maybe=hello"])
    assert isinstance(settings, Settings) and isinstance(settings.optimizer, Optimizer)
    expected = {"steps": 20, "mode": "b", "optimizer": {"lr": 3e-4, "betas": [0.5, 0.6]}, "maybe": "hello"}
    assert asdict(settings) == {**expected, "names": [], "extra": {"x": 1.5}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; the nearest known one is 'optimizer.lr'"),
        ("lr=1", "'lr'; the nearest known one is 'optimizer.lr'"), ("steps=many", "steps"), ("mode=c", "mode"),
        ("steps", "key=value"),
    ],
)  # fmt: skip
def test_wrong_keys_and_values_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(Settings, None, [override])


@pytest.mark.parametrize(
    "typed", ["2024_06_01", "/data/run #2", "007", "1e3", "off", "12:30", "2024-06-01", "0x10", "a: b", "~x", "null_"]
)
def test_text_stays_as_it_was_typed_where_the_schema_says_text(tmp_path, typed):
    assert load_config(Settings, None, [f"maybe={typed}"]).maybe == typed
    (tmp_path / "x.yaml").write_text(f"maybe: {typed if '#' not in typed and ': ' not in typed else repr(typed)}\n")
    assert load_config(Settings, tmp_path / "x.yaml").maybe == typed


def test_lists_of_text_nulls_and_quotes_are_read_as_yaml_means_them(tmp_path):
    (tmp_path / "x.yaml").write_text("names: [2024_06_01, on, 3e-4]\nmaybe: null\n")
    settings = load_config(Settings, tmp_path / "x.yaml", ["maybe=null"])
    assert settings.names == ["2024_06_01", "on", "3e-4"] and settings.maybe is None
    assert load_config(Settings, None, ["maybe='quoted: text'", "steps=1_000"]) == Settings(1000, maybe="quoted: text")
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "x.yaml").write_text("maybe: Mäuse\n", encoding=encoding)
        assert load_config(Settings, tmp_path / "x.yaml").maybe == "Mäuse"


def test_unknown_yaml_keys_name_the_file_and_ignored_ones_are_listed(tmp_path, caplog):
    path = tmp_path / "x.yaml"
    for value in ("true", "null"):
        path.write_text(f"steps: 3\nenable_xformers: {value}\n")
        with pytest.raises(ValueError, match="x.yaml: unknown key 'enable_xformers'"):
            load_config(Settings, path)
        with caplog.at_level("INFO"):
            assert load_config(Settings, path, ignored={"enable_xformers"}).steps == 3
    assert "enable_xformers" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,", "x.yaml is not valid YAML"), ("steps: !!python/object/apply:os.system ['true']", "x.yaml"),
        ("just text", "x.yaml"), ("[1, 2]", "x.yaml"), ("a: " + "[" * 5000, "x.yaml is not valid YAML"),
        ("a: &a [x]\n" + "b: [*a,*a]\n" * 20, "more than 16 aliases"), ("steps: " + "9" * 5000, "x.yaml"),
        ("base: x.yaml", "name itself"), ("base: [1]", "x.yaml.*base must be a text"), ("optimizer: 3", "mapping"),
        ("base: none.yaml", "none.yaml does not exist"), ("steps: null", "x.yaml"), ("? [a]\n: b", "x.yaml"),
        ("maybe: ${oc.env:HOME}${", "x.yaml"), ("# " + "x" * 1_100_000, "the limit"), ("1: 2", "unknown key '1'"),
    ],
)  # fmt: skip
def test_a_missing_or_broken_file_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(Settings, tmp_path / "x.yaml")


# ---- flags made from a dataclass ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    data: Path = option(..., "where")
    count: int = option(3, "how many", least=1)
    body_length: float | None = option(None, "mm", least=0)
    split: str = option("blocks", "how", choices=("blocks", "random"))
    jumps: tuple[int, ...] = option((), "frames")
    mirror: bool = option(True, "both sides")

    def __post_init__(self):
        if self.split == "random" and self.jumps:
            raise ValueError("--jumps goes with --split blocks")


def parse(typed: str) -> Flags:
    parser = argparse.ArgumentParser()
    add_fields(parser, Flags)
    return from_arguments(Flags, parser.parse_args(typed.split()))


def test_flags_follow_the_dataclass_and_what_concerns_several_is_checked_by_it():
    assert parse("--data d") == Flags(Path("d"), 3, None, "blocks", (), True)
    given = parse("--data d --count 5 --body_length 2.5 --jumps 4 9 --no-mirror")
    assert given == Flags(Path("d"), 5, 2.5, "blocks", (4, 9), False)
    with pytest.raises(ValueError, match="--jumps"):
        parse("--data d --split random --jumps 1")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("", "--data"), ("--data d --count 0", "at least 1"), ("--data d --count x", "invalid int"),
        ("--data d --split by", "invalid choice"), ("--data d --body_length nan", "finite"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_exit_code_2(typed, told, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(typed)
    assert stop.value.code == 2 and told in capsys.readouterr().err
