"""The documentation: every command parses, every link leads somewhere, its Python runs, generated pages are current."""

import argparse
import functools
import re
import runpy
import shlex
import sys

import config_keys
import pytest
from commands import ROOT, code_blocks

PAGES = sorted(
    path for folder in ("docs", "docs/guides", "docs/model_cards", ".") for path in (ROOT / folder).glob("*.md")
)
# Programs of others, which need a cluster, a container, a GPU, or files of the user's.
FOREIGN = {"ffmpeg", "magick", "colmap", "docker", "srun", "df", "ulimit", "unset", "export", "git", "ruff", "source"}
LAUNCHERS = ("torchrun", "accelerate", "python", ".venv/bin/python")


class Parsed(BaseException):
    """Ends a script where its arguments are known to be good."""


def commands_of(text: str) -> list[str]:
    """Returns the command lines of a page: those of its bash blocks, and code in the text that starts a program."""
    lines = [line for block in code_blocks(text, "bash") for line in block.splitlines()]
    lines += re.findall(
        r"`((?:python|torchrun|accelerate|bash|srun|pip) [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    return [part.strip() for line in lines if line[:1] not in ("#", "") for part in line.split("&&")]


def words_of(command: str) -> list[str]:
    """Returns a command's words; what stands for something of the user's becomes a word or a number."""
    command = re.sub(r"<[^>]*>", "X", command.partition("  #")[0])
    command = re.sub(r"--config \.\.\.|\.\.\.|--help", "", re.sub(r"\[(--[^\]]*)\]", r"\1", command))
    command = re.sub(r"\{([^,{}]*),[^{}]*\}(?![\]'])", r"\1", command)  # {1,2,full}
    return [re.sub(r"^N$", "1", word) for word in shlex.split(command)]


@functools.cache
def check(command: str) -> None:
    """Lets the script's own parser read the command, what is required left aside: a page may leave that out."""
    words = words_of(command)
    if words[0] in FOREIGN:
        return
    if words[0] in ("bash", "pip") or words[1:2] == ["-m"]:
        assert words[0] == "pip" or words[1] == "-m" or (ROOT / words[1]).is_file(), command
        return
    assert words[0] in LAUNCHERS, command
    at = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:  # `python <script> --help`, `torchrun --nproc_per_node N ...`
        assert words[0] in ("torchrun", "accelerate") or words[1] == "X", command
        return
    assert (ROOT / words[at]).is_file(), f"{command}: there is no {words[at]}"
    with pytest.MonkeyPatch.context() as patch:
        parse = argparse.ArgumentParser.parse_known_args

        def parse_only(parser, arguments=None, namespace=None):
            for entry in (*parser._actions, *parser._mutually_exclusive_groups):
                entry.required = False
            rest = parse(parser, arguments, namespace)[1]
            overrides = any(entry.dest == "overrides" for entry in parser._actions)
            wrong = [word for word in rest if word.startswith("-") or not overrides]
            raise Parsed(*wrong)

        for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, parse_only)
        patch.setattr(sys, "argv", words[at:])
        try:
            runpy.run_path(str(ROOT / words[at]), run_name="__main__")
        except Parsed as parsed:
            assert not parsed.args, f"{command}: {words[at]} knows nothing of {parsed.args}"
        except SystemExit as stop:
            raise AssertionError(f"{command}: refused by its own parser") from stop


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_pages_is_one_that_its_script_takes(page):
    for command in commands_of(page.read_text()):
        check(command)


def test_a_command_with_a_wrong_flag_is_found():
    for command in ("python inference_mouse.py --input_picture a.png", "python scripts/no_such.py", "make all"):
        with pytest.raises(AssertionError):
            check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_page_and_a_heading(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.+)$", other.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{page.name}: {target}, there are {sorted(slugs)}"


def test_the_page_of_config_keys_is_current_and_leaves_no_key_unexplained():
    """`python tests/config_keys.py` writes it."""
    assert config_keys.PAGE.read_text() == config_keys.page()
    unexplained = re.findall(r"^\| `([\w.]+)` .* \|  \|$", config_keys.PAGE.read_text(), re.M)
    assert not [key for key in unexplained if not key.startswith("wandb.")], unexplained


def test_the_python_of_the_api_page_runs(tmp_path, monkeypatch):
    for name in ("examples", "data_mouse"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in code_blocks((ROOT / "docs" / "python_api.md").read_text(), "python"):
        exec(block, names)
    assert names["images"].shape == (1, 8, 3, 128, 128) and names["fitted"].record["refinement"]["iterations"]
    assert (tmp_path / "outputs/from_python/run.json").is_file() and (
        tmp_path / "outputs/from_python/gaussians.splat"
    ).is_file()


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.name != "README.md"]
    assert not [page.name for page in pages if f"({page.relative_to(ROOT / 'docs')}" not in index]
