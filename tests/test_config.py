"""The door where YAML becomes typed objects."""

from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest

from multiview.config import load_config


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
    assert (settings.steps, settings.mode, settings.optimizer.lr) == (20, "b", 3e-4)
    assert settings.optimizer.betas == [0.5, 0.6] and settings.maybe == "hello" and settings.extra == {"x": 1.5}
    assert asdict(settings)["optimizer"]["lr"] == 3e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; the nearest known one is 'optimizer.lr'"),
        (["lr=1"], "'lr'; the nearest known one is 'optimizer.lr'"),
        (["steps=many"], "steps"),
        (["mode=c"], "mode"),
        (["steps"], "key=value"),
    ],
)
def test_wrong_keys_and_values_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_config(Settings, None, overrides)


@pytest.mark.parametrize(
    "typed", ["2024_06_01", "/data/run #2", "007", "1e3", "off", "12:30", "2024-06-01", "0x10", "a: b", "~x", "null_"]
)
def test_text_stays_as_it_was_typed_where_the_schema_says_text(tmp_path, typed):
    assert load_config(Settings, None, [f"maybe={typed}"]).maybe == typed
    (tmp_path / "x.yaml").write_text(f"maybe: {typed if '#' not in typed and ': ' not in typed else repr(typed)}\n")
    assert load_config(Settings, tmp_path / "x.yaml").maybe == typed
    (tmp_path / "x.yaml").write_text("names: [2024_06_01, on, 3e-4]\nmaybe: null\n")
    settings = load_config(Settings, tmp_path / "x.yaml", ["maybe=null"])
    assert settings.names == ["2024_06_01", "on", "3e-4"] and settings.maybe is None
    assert load_config(Settings, None, ["maybe='quoted: text'", "steps=1_000"]) == Settings(1000, maybe="quoted: text")


def test_unknown_yaml_keys_name_the_file_and_ignored_ones_are_listed(tmp_path, caplog):
    path = tmp_path / "x.yaml"
    path.write_text("steps: 3\nenable_xformers: true\n")
    with pytest.raises(ValueError, match="x.yaml: unknown key 'enable_xformers'"):
        load_config(Settings, path)
    with caplog.at_level("INFO"):
        assert load_config(Settings, path, ignored={"enable_xformers"}).steps == 3
    assert "enable_xformers" in caplog.text
    path.write_text("steps: 3\nenable_xformers: null\n")
    assert load_config(Settings, path, ignored={"enable_xformers"}).steps == 3


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


def test_utf16_and_byte_order_marks_are_read(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "x.yaml").write_text("maybe: Mäuse\n", encoding=encoding)
        assert load_config(Settings, tmp_path / "x.yaml").maybe == "Mäuse"
