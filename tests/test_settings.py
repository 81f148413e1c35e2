"""Flags made from a dataclass."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from multiview.config import add_fields, from_arguments, option


@dataclass(frozen=True)
class Settings:
    data: Path = option(..., "where")
    count: int = option(3, "how many", least=1)
    body_length: float | None = option(None, "mm", least=0)
    split: str = option("blocks", "how", choices=("blocks", "random"))
    jumps: tuple[int, ...] = option((), "frames")
    mirror: bool = option(True, "both sides")

    def __post_init__(self):
        if self.split == "random" and self.jumps:
            raise ValueError("--jumps goes with --split blocks")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_fields(parser, Settings)
    return from_arguments(Settings, parser.parse_args(arguments))


def test_flags_follow_the_dataclass():
    assert parse("--data", "d") == Settings(Path("d"), 3, None, "blocks", (), True)
    given = parse("--data", "d", "--count", "5", "--body_length", "2.5", "--jumps", "4", "9", "--no-mirror")
    assert given == Settings(Path("d"), 5, 2.5, "blocks", (4, 9), False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "--data"), (("--data", "d", "--count", "0"), "at least 1"),
        (("--data", "d", "--count", "x"), "invalid int"),
        (("--data", "d", "--split", "by"), "invalid choice"), (("--data", "d", "--body_length", "nan"), "finite"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_exit_code_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_what_concerns_several_flags_is_checked_by_the_dataclass():
    with pytest.raises(ValueError, match="--jumps"):
        parse("--data", "d", "--split", "random", "--jumps", "1")
