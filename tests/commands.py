"""Command lines run word for word, each in a process of its own that is forked from a warm interpreter.

The programs' own parsers, launchers and exit codes take part; only what Python imports is paid once for all commands.
"""

import functools
import importlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM = (
    "torchvision", "omegaconf", "mvdiffusion.training", "mvdiffusion.demo", "gslrm.training",
    "gslrm.model.rasterizers.cpu", "pipeline.model", "synthetic.dataset", "recording.importer",
    "recording.quality.report",
)  # fmt: skip


def code_blocks(page: str, language: str) -> list[str]:
    """Returns a page's fenced blocks of one language, bash with its continued lines joined."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)
    return [re.sub(r"\s*\\\n\s*", " ", block) for block in blocks]


@functools.cache
def server() -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs `python script ...`, `torchrun ...` or `accelerate launch ...` in a folder that stands for the checkout."""
    print(json.dumps([command, str(folder)]), file=server().stdin, flush=True)
    code = int(server().stdout.readline())
    return subprocess.CompletedProcess(command, code, *((folder / f".{name}").read_text() for name in ("out", "err")))


def serve() -> tuple[str, Path] | None:
    """Forks for every command that comes in; returns in the child with it, and in the server at the end."""
    for name in WARM:
        importlib.import_module(name)
    for line in sys.stdin:
        command, folder = json.loads(line)
        child = os.fork()
        if not child:
            return command, Path(folder)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(command: str, folder: Path) -> None:
    """Turns this process into the command's."""
    import accelerate.commands.launch
    import torch.distributed.run as launcher

    signal.alarm(300)  # one that hangs is killed
    os.chdir(folder)
    for number, path in ((0, "/dev/null"), (1, ".out"), (2, ".err")):
        os.dup2(os.open(path, (os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if number else os.O_RDONLY), number)
    for module in list(sys.modules.values()):  # what ships lies beside the code: in this folder
        if getattr(module, "REPOSITORY", None) == ROOT:
            module.REPOSITORY = folder
    launch = launcher.run

    def launch_warm(args) -> None:
        args.run_path, args.start_method = True, "fork"  # instead of a new interpreter per process
        args.rdzv_endpoint = args.rdzv_endpoint and "localhost:0"  # another run of the tests may hold the named port
        launch(args)

    launcher.run = launch_warm
    program, *sys.argv = shlex.split(command)
    if program == "python":
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif program == "torchrun":
        launcher.main(sys.argv)
    else:
        accelerate.commands.launch.main()  # sys.argv: launch ...


if __name__ == "__main__" and (told := serve()):
    become(*told)
