"""Files and folders: read with errors that name them, written whole or not at all, owned by one process at a time."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import reprlib
import shutil
import socket
import stat
import struct
import tempfile
import threading
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

DAMAGE = (  # what libraries raise for a file that is cut, altered or none of theirs (RecursionError is a RuntimeError)
    OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
    ZeroDivisionError, MemoryError, RuntimeError, AssertionError, struct.error, zlib.error, zipfile.BadZipFile,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
KINDS = {str: "a text", bool: "true or false", dict: "an object of keys and values", list: "a list"}
OS_ERROR = re.compile(r"\(os error (\d+)\)")
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # full, over a quota or limit, read-only
LEFTOVER = re.compile(r"^\.(.+)\.[0-9a-f]{8}\.(tmp|old)$")  # what a killed `atomic_write` or `atomic_folder` leaves
LOCK_FILE = ".owner.json"
BEAT_S, STALE_S = 30.0, 300.0  # an owner touches its lock every BEAT_S; untouched for STALE_S it counts as dead
TEXT_LIMIT_BYTES = 256 * 2**20
BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def read_text(path: Path | str) -> str:
    """Returns a text file's content: UTF-8 with or without byte order mark, or UTF-16 with one; else a ValueError."""
    path = Path(path)
    try:
        if path.stat().st_size > TEXT_LIMIT_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size / 1e6:.0f} MB; text of at most 256 MB is expected")
        content = path.read_bytes()
        encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
        return content.decode(encoding).replace("\r\n", "\n")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 or UTF-16 (byte {error.start}); save it as UTF-8") from None


def read_json(path: Path | str, kind: type = dict):
    """Returns a JSON file's content, which must be of `kind` (dict or list). Raises ValueError naming the file."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except RecursionError:  # Python's parser gives up at about a thousand levels
        raise ValueError(f"{path} is not valid here: its JSON is nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold {KINDS[kind]}, got {type(content).__name__}")
    return content


def read_lines(path: Path | str) -> list[str]:
    """Returns the lines of a list file, stripped, without empty ones. Raises ValueError naming the file."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


@contextmanager
def damage_explained(what: str) -> Iterator[None]:
    """Turns what a library raises while it decodes a file (`what`: its kind and path) into a ValueError."""
    try:
        yield
    except DAMAGE as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what} cannot be read: {told[0][:200]}") from error


def take(
    content: object, key: str, kind: type | tuple[int, ...], where: str, *, default: Any = ..., least: float = -1e30,
    most: float = 1e30,
) -> Any:  # fmt: skip
    """Returns content[key], checked; every reader takes its values through this door. Raises ValueError.

    kind: str, bool, dict, list, int, float (512.0 is an int), or the shape of nested lists of numbers (-1: any length),
    finite and in least..most. where: file and place, for the message. default: stands for a missing key or null.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold an object of keys and values, got {reprlib.repr(content)}")
    if default is not ... and content.get(key) is None:
        return default
    if key not in content:
        raise ValueError(f"{where} lacks {key}")
    return _checked(content[key], kind, f"{where}: {key}", least, most)


def _checked(value: Any, kind: type | tuple[int, ...], where: str, least: float, most: float) -> Any:
    if isinstance(kind, tuple):
        if isinstance(value, list) and kind[0] in (-1, len(value)):
            return [_checked(entry, kind[1:] or float, where, least, most) for entry in value]
        wanted = "x".join("n" if side < 0 else str(side) for side in kind) + " numbers"
    elif kind in (int, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and least <= value <= most and kind(value) == value:
            return kind(value)
        limits = [f"at least {least:g}"] * (least > -1e30) + [f"at most {most:g}"] * (most < 1e30)
        wanted = ", ".join(["a whole number" if kind is int else "a finite number", *limits])
    elif isinstance(value, kind):
        return value
    else:
        wanted = KINDS[kind]
    raise ValueError(f"{where} must be {wanted}, got {reprlib.repr(value)}")


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed over it on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # of a full disk neither the system nor a library says which file it was
        is_ours = isinstance(error, OSError) and error.filename == str(temporary)  # a name that the user never gave
        if (number := error.errno if is_ours else refusal(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        with suppress(OSError):  # where nothing can be written the system says so before it says that nothing is there
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, renamed to it on success. An existing `path` is replaced last."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        # Who may read the folder may read its files: safetensors keeps those it writes for their owner alone.
        allowed = temporary.stat().st_mode & 0o666
        for written in temporary.rglob("*"):
            mode = written.lstat().st_mode
            if stat.S_ISREG(mode) and mode | allowed != mode:
                written.chmod(mode | allowed)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        if old.exists():
            shutil.rmtree(old)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def refusal(error: BaseException) -> int | None:
    """Returns the number of CANNOT_WRITE that is behind an exception, None where another reason is."""
    cause, number = error if isinstance(error, Exception) and not isinstance(error, ValueError) else None, None
    while cause is not None and number not in CANNOT_WRITE:
        told = OS_ERROR.search(str(cause))  # safetensors and tokenizers give the number in their text
        number = cause.errno if isinstance(cause, OSError) else int(told[1]) if told else None
        cause = cause.__context__  # torch.save reports an error of its own over the system's
    return number if number in CANNOT_WRITE else None


@contextmanager
def full_disk_explained(path: Path | str, needed_bytes: int = 0) -> Iterator[None]:
    """Turns a full disk (or quota) while writing `path` into a ValueError that says what is missing and what to do."""
    try:
        yield
    except BaseException as error:  # some libraries raise nothing more precise than Exception
        if (number := refusal(error)) is None:
            raise
        path = Path(path).absolute()
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
        needed = f"needs {needed_bytes / 1e6:.1f} MB, " if needed_bytes else ""
        raise ValueError(
            f"cannot write {path}: {os.strerror(number)} ({needed}{free / 1e6:.1f} MB free on that disk). Files "
            "written before are whole and untouched. Make room or choose another folder, then repeat the command "
            "(a training resumes from its newest checkpoint)"
        ) from error


def write_json(path: Path | str, content: object) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def owned_folder(path: Path | str) -> Iterator[Path]:
    """Makes this process the only owner of a run folder, which is created; a second process is refused at once.

    The lock is a file made with O_EXCL (NFS and Lustre honour it where flock does not exist) with host, process and
    start time. It is stale when its process is gone (same host) or it was not touched for STALE_S (another host); what
    a killed run left half written is then removed. Raises ValueError for a living owner.
    """
    import psutil

    folder, lock = Path(path), Path(path) / LOCK_FILE
    folder.mkdir(parents=True, exist_ok=True)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": psutil.Process().create_time()}
    while True:
        try:
            with open(lock, "x") as handle:
                json.dump(me, handle)
            break
        except FileExistsError:
            _take_stale(lock)
    remove_leftovers(folder)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            try:
                os.utime(lock)
            except OSError:  # the folder was removed under the run: its next write says so
                return

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield folder
    finally:
        ended.set()
        lock.unlink(missing_ok=True)


def _take_stale(lock: Path) -> None:
    """Moves a stale lock away, so that its folder can be owned anew. Raises ValueError for a living owner."""
    import psutil

    aside = lock.with_name(f".{lock.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        content = lock.read_bytes()
        # By the clock that dates this disk's files: a file server's may differ from this machine's.
        with tempfile.NamedTemporaryFile(dir=lock.parent) as probe:
            age_s = os.stat(probe.name).st_mtime - lock.stat().st_mtime
        host, pid, start = "an unknown host", 0, 0.0
        with suppress(ValueError, KeyError, TypeError):  # its owner was killed, or is about to write it
            owner = json.loads(content)
            host, pid, start = str(owner["host"]), int(owner["pid"]), float(owner["start"])
        is_alive = age_s < STALE_S
        if host == socket.gethostname():
            is_alive = False
            with suppress(psutil.Error):  # a later process may carry the same number
                is_alive = abs(psutil.Process(pid).create_time() - start) < 2.0
        if is_alive:
            raise ValueError(
                f"{lock.parent} is in use by process {pid} on {host}: two runs in one folder would spoil each other. "
                f"Wait, stop that one, or choose another folder; if it is surely dead, delete {lock}. (Several "
                "processes of one run are started by torchrun or accelerate launch; srun alone starts that many "
                "separate runs)"
            )
        os.replace(lock, aside)
    except FileNotFoundError:  # its owner ended meanwhile, or another one took it
        return
    if aside.read_bytes() != content:  # a new owner's lock, between reading and moving: give it back
        os.link(aside, lock)
    aside.unlink()


def remove_leftovers(folder: Path | str) -> None:
    """Removes what killed runs left half written in a folder; what they were about to replace is put back."""
    for path in Path(folder).glob(".*"):
        match = LEFTOVER.match(path.name)
        if match is None:
            continue
        if match[2] == "old" and not path.with_name(match[1]).exists():  # killed between the two renames
            os.replace(path, path.with_name(match[1]))
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
