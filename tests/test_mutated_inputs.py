"""Damaged and hostile files of every format that is read: one sentence that names the file, never a traceback.

Each row names a format, what makes a good file of it, and its reader. Every file is then cut, flipped, nested, typed
wrongly, and so on; a reader may take what is left (it may still be good) or raise ValueError.
"""

import contextlib
import io
import json
import random
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPVisionModelWithProjection

from gslrm.config import GSLRMConfig
from gslrm.model.gaussians import Gaussians
from gslrm.model.ply import load_ply, save_ply
from multiview.cameras import Cameras, read_cameras
from multiview.checkpoint import load_checkpoint, read_rig, read_sidecar, save_checkpoint
from multiview.config import load_config
from multiview.image import read_photo, read_rgba, save_video, write_image
from multiview.rig import load_rig
from multiview.sample import read_dataset_info, read_sample, read_split
from mvdiffusion import components
from mvdiffusion.facelift_yaml import load_training_config
from mvdiffusion.models.unet import load_unet
from mvdiffusion.prompts import load_prompt_embeds
from recording.calibration.formats import read_calibration, write_calibration
from recording.calibration.model import Calibration
from recording.video import VideoReader, probe

ROOT = Path(__file__).resolve().parent.parent
DEMO = "checkpoints/demo/mvdiffusion"
SECONDS = 60  # for one file, on a busy machine; nothing hangs


def copied(folder: Path, source: str) -> Path:
    """A file (with its folder) that ships with the project."""
    path = ROOT / source
    shutil.copytree(path.parent, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("sample_*", "*.mp4"))
    return folder / path.name


def calibration(folder: Path, kind: str, file: str = "") -> Path:
    cameras = Cameras.orbit(torch.tensor([0.0, 60.0, 200.0]), torch.full((3,), 20.0), 300.0, 1.1, 256)
    K = cameras.intrinsic_matrix().double().numpy()
    known = Calibration(K, cameras.w2c.double().numpy(), np.zeros((3, 5)), ((256, 256),) * 3, "made here")
    path = write_calibration(folder, known, kind)
    return path / file if file else path


def made(folder: Path, name: str, write) -> Path:
    write(folder / name)
    return folder / name


def gaussians(path: Path) -> None:
    shapes = {"xyz": (9, 3), "features": (9, 1, 3), "scaling": (9, 3), "rotation": (9, 4), "opacity": (9, 1)}
    save_ply(path, Gaussians(**{name: torch.rand(1, *shape) for name, shape in shapes.items()}))


def weights(path: Path) -> None:
    save_checkpoint(path, {"model": {"w": torch.rand(40, 40)}}, {"step": 1, "rig": load_rig("mouse6").to_dict()})


def jpeg(path: Path) -> None:
    from PIL import Image

    Image.effect_noise((48, 40), 80).convert("RGB").save(path, quality=90, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")


def film(path: Path) -> None:
    with VideoReader(probe([path])) as reader:
        reader.read_bgr(0)


CASES = {  # format: (what makes a good file, and its arguments), its reader
    "opencv_cameras.json": ((copied, "data_mouse/sample_000000/opencv_cameras.json"), read_cameras),
    "sample folder": ((copied, "data_mouse/sample_000000/opencv_cameras.json"), lambda p: read_sample(p.parent)),
    "dataset.json": ((copied, "data_mouse/dataset.json"), lambda p: read_dataset_info(p.parent)),
    "split list": ((copied, "data_mouse/data_mouse_train.txt"), read_split),
    "rig YAML": ((copied, "configs/rigs/mouse6.yaml"), load_rig),
    "rig.json": ((copied, f"{DEMO}/unet/rig.json"), lambda p: read_rig(p.parent)),
    "training YAML 1": ((copied, "configs/mouse_mvdiffusion.yaml"), load_training_config),
    "training YAML 2": ((copied, "configs/mouse_gslrm_v2.yaml"), lambda p: load_config(GSLRMConfig, p)),
    "checkpoint": ((made, "ckpt_1.pt", weights), load_checkpoint),
    "sidecar": ((made, "ckpt_1.pt.json", lambda p: weights(p.with_suffix(""))),
                lambda p: read_sidecar(p.with_suffix(""))),
    "PNG": ((made, "a.png", lambda p: write_image(p, torch.rand(4, 40, 48))), read_photo),
    "JPEG": ((made, "a.jpg", jpeg), lambda p: (read_photo(p), read_rgba(p))),
    "mp4": ((made, "0.mp4", lambda p: save_video(p, torch.rand(4, 3, 64, 64))), film),
    "PLY": ((made, "a.ply", gaussians), load_ply),
    "prompt metadata": ((copied, f"{DEMO}/prompt_embeds/metadata.json"), lambda p: load_prompt_embeds(p.parent)),
    "prompt embeddings": ((copied, f"{DEMO}/prompt_embeds/clr_embeds.pt"), load_prompt_embeds),
    "VAE config.json": ((copied, f"{DEMO}/vae/config.json"),
                        lambda p: components._load_diffusers(AutoencoderKL, p.parent, torch.float32)),
    "CLIP config.json": ((copied, f"{DEMO}/image_encoder/config.json"),
                         lambda p: components._load_clip(CLIPVisionModelWithProjection, p.parent, torch.float32)),
    "scheduler config": ((copied, f"{DEMO}/scheduler/scheduler_config.json"),
                         lambda p: components._load_scheduler(DDIMScheduler, p.parent)),
    "UNet config.json": ((copied, f"{DEMO}/unet/config.json"),
                         lambda p: load_unet(p.parent)),
    "preprocessor config": ((copied, f"{DEMO}/feature_extractor/preprocessor_config.json"),
                            lambda p: components.load_feature_extractor(p.parent)),
    "COLMAP cameras, text": ((calibration, "colmap_text", "cameras.txt"), lambda p: read_calibration(p.parent)),
    "COLMAP cameras, binary": ((calibration, "colmap_binary", "cameras.bin"), lambda p: read_calibration(p.parent)),
    "calibration COLMAP text": ((calibration, "colmap_text", "images.txt"), lambda p: read_calibration(p.parent)),
    "calibration COLMAP binary": ((calibration, "colmap_binary", "images.bin"), lambda p: read_calibration(p.parent)),
    **{f"calibration {name}": ((calibration, name.lower()), read_calibration)
       for name in ("opencv", "transforms", "blender", "DANNCE", "MAMMAL", "Anipose")},
}  # fmt: skip
LEAVES = (None, "text", -1, 0, True, [], {}, [[1, 2], [3]], float("nan"), float("inf"), 10**30, "../../x", "a" * 5000)


def mutations(path: Path, good: bytes, draw: random.Random):
    """Yields (what was done, bytes of the file)."""
    for part in (0.0, 0.1, 0.5, 0.97):
        yield f"cut at {part:.0%}", good[: int(part * len(good))]
    for turn in range(3):
        flipped = bytearray(good)
        for _ in range(6):  # near its head, where formats keep their structure
            flipped[draw.randrange(min(len(good), 1500))] ^= 1 << draw.randrange(8)
        yield f"bits flipped, {turn}", bytes(flipped)
    half = len(good) // 2
    yield "block of zeros", good[:half] + bytes(min(64, half)) + good[half + 64 :]
    yield "halves swapped", good[half:] + good[:half]
    if path.suffix not in (".json", ".yaml", ".txt", ".toml"):
        return
    yield "byte order mark", b"\xef\xbb\xbf" + good
    yield "UTF-16", good.decode().encode("utf-16")
    yield "nested deeply", b'{"frames": ' + b"[" * 60_000
    yield "nested deeply, closed", b'{"rig": ' + b"[" * 900 + b"]" * 900 + b"}"
    if path.suffix not in (".json", ".yaml"):
        return
    for turn in range(10):
        content = json.loads(good) if path.suffix == ".json" else yaml.safe_load(good)
        node, key = content, draw.choice(sorted(content))
        while isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
            node = node[key]
            key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
        leaf = draw.choice(LEAVES)
        if turn % 4 == 3 and isinstance(node, dict):
            node[f"{key}_"] = node.pop(key)
        else:
            node[key] = leaf
        written = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
        yield f"{key}: {leaf!r:.20}" if turn % 4 != 3 else f"{key} renamed", written.encode()


@pytest.mark.parametrize("name", CASES)
def test_a_mutated_file_is_one_sentence_that_names_it(name, tmp_path):
    (make, *arguments), read = CASES[name]
    (tmp_path / "good").mkdir()
    path = make(tmp_path / "good", *arguments)
    read(path)
    good, listed = path.read_bytes(), sorted(tmp_path.rglob("*"))
    failed, tried = [], 0

    def too_long(*_):
        raise AssertionError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    for done, content in mutations(path, good, random.Random(name)):
        path.write_bytes(content)
        tried += 1
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                read(path)
        except ValueError as error:
            if path.name not in str(error) and path.parent.name not in str(error):
                failed.append(f"{done}: names no file: {error}"[:300])
        except BaseException as error:  # what must not happen is anything else
            failed.append(f"{done}: {type(error).__name__}: {error}"[:300])
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert tried >= 9 and sorted(tmp_path.rglob("*")) == listed
    assert not failed, "\n".join(failed)
