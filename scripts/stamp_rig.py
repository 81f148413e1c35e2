"""States once which view rig public weights or a foreign dataset belong to, by writing it beside them.

A folder with samples or a split list gets `dataset.json`, any other folder `rig.json`, a .pt file its JSON sidecar.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser
from multiview.run import main_guard


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rig", required=True, help="a rig's name (configs/rigs) or a YAML/JSON file")
    parser.add_argument("--path", required=True, type=Path, help="a UNet folder, a dataset folder, or a ckpt_*.pt")
    parser.add_argument("--replace", action="store_true", help="replace a rig that is already there")
    arguments = parser.parse_args()
    from multiview.checkpoint import read_rig, read_sidecar, sidecar_path, stamp_rig
    from multiview.files import write_json
    from multiview.rig import ViewRig, load_rig
    from multiview.sample import CAMERAS_FILE, DATASET_FILE, read_dataset_info, write_dataset_info

    rig, path, content = load_rig(arguments.rig), arguments.path, {}
    if not path.exists():
        raise ValueError(f"--path {path} does not exist")
    if path.is_file() and path.suffix not in (".pt", ".pth", ".ckpt"):
        raise ValueError(f"--path {path} is no checkpoint; a .pt file, a folder of weights or a dataset is expected")
    if path.is_file():
        content = read_sidecar(path) or {}
        present = ViewRig.from_dict(content["rig"], str(sidecar_path(path))) if "rig" in content else None
    elif (path / DATASET_FILE).is_file():
        content = read_dataset_info(path)
        present = content.pop("rig")
    else:
        present = read_rig(path)
    if present is not None and present.differences(rig) and not arguments.replace:
        told = f"{path} already carries rig {present.name}, which differs from {rig.name}"
        raise ValueError(f"{told}; --replace replaces it")
    # A dataset has its dataset.json already, or sample folders, or is the folder of a split list alone.
    is_list = any(path.glob("*.txt")) and not (path / "config.json").is_file()
    if path.is_file():
        write_json(sidecar_path(path), {**content, "rig": rig.to_dict()})
    elif is_list or any(path.glob(f"*/{CAMERAS_FILE}")) or (path / DATASET_FILE).is_file():
        write_dataset_info(path, rig, **content)
    else:
        stamp_rig(path, rig)
    print(f"{path}: rig {rig.name} ({rig.num_views} views, fingerprint {rig.fingerprint()})")


if __name__ == "__main__":
    main_guard(main)
