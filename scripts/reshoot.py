"""Films refined samples again with a rig's exact cameras: training data for both stages from any calibrated rig.

Every sample's views are fitted, as inference_mouse.py --sample_dir does, and rendered as the rig's views and as random
novel ones, with soft masks and depth. Samples whose fit to all views but one cannot show that one are left out, and
listed. Repeating the command continues it; torchrun shares it out.
  python scripts/reshoot.py --data data_mouse/data_mouse_train.txt --output_dir data_reshot
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, add_fields, from_arguments, option
from multiview.run import main_guard


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: tuple[Path, ...] = option(..., "split lists of one dataset, each gives one of the same name")
    output_dir: Path = option(..., "dataset folder, new or to be continued")
    rig: str = option("mouse6", "the rig that films, by name or file; default: mouse6")
    num_novel_views: int = option(2, "random views besides the rig's; default: 2", least=0)
    image_size: int = option(256, "pixels of the new images; default: 256", least=16)
    least_psnr: float = option(16.0, "foreground PSNR in dB of the left-out view, below which a sample is left out")
    checkpoint: Path | None = option(None, "Stage 2: ckpt_*.pt or a folder of them; default: demo model")
    seed: int = option(0, "of fits and novel cameras")
    device: str = option("auto", "auto, cpu or cuda")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_fields(parser, Settings)
    settings = from_arguments(Settings, parser.parse_args())
    from multiview.files import full_disk_explained
    from multiview.run import check_output_folder, process_share
    from pipeline import MouseFaceLift
    from pipeline.reshoot import reshoot_lists

    check_output_folder(settings.output_dir)
    share, device = process_share(settings.device)
    model = MouseFaceLift.load(device=device, stages="2", checkpoint=settings.checkpoint)
    with full_disk_explained(settings.output_dir / "dataset.json"):
        for line in reshoot_lists(settings, model, share):
            print(line)


if __name__ == "__main__":
    main_guard(main)
