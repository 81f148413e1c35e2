"""The door where YAML becomes typed objects."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from multiview.config import config_to_dict, load_config


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
    assert config_to_dict(settings)["optimizer"]["lr"] == 3e-4


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


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(Settings, tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(ValueError, match="broken.yaml is not valid YAML"):
        load_config(Settings, tmp_path / "broken.yaml")
    (tmp_path / "tag.yaml").write_text("steps: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ValueError, match="tag.yaml"):
        load_config(Settings, tmp_path / "tag.yaml")
