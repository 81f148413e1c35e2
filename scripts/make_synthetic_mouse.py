"""Makes a dataset of synthetic mice: posed RGBA views for any rig, extra novel views, depth.

Every sample depends on --seed and its number only. Repeating a command continues it and keeps complete samples.

With --as_recording it writes a raw recording instead, as a laboratory would have it: one mouse walking about, filmed by
the six cameras of the public markerless_mouse_1 rig (videos_undist/, simpleclick_undist/, new_cam.pkl, and the truth in
truth.json and truth.npz: centre, keypoints, points of the surface), ready for scripts/process_mouse_data.py.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, add_fields, from_arguments
from multiview.run import check_output_folder, main_guard
from synthetic.settings import MouseSettings


def parse_arguments(arguments: list[str] | None = None) -> MouseSettings:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_fields(parser, MouseSettings)
    try:
        return from_arguments(MouseSettings, parser.parse_args(arguments))
    except ValueError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(arguments)
    folder = settings.output_dir
    from multiview.files import full_disk_explained
    from synthetic.dataset import record_mouse, write_dataset

    check_output_folder(folder)
    with full_disk_explained(folder):
        if settings.as_recording:
            print(f"{folder}: {settings.num_samples} frames from {record_mouse(settings)} cameras; import it with")
            # Beside the recording: data_mouse holds the tracked example, which would be moved away.
            places = [shlex.quote(f"{folder}{ending}") for ending in ("/videos_undist", "", "_samples")]
            importer = "python scripts/process_mouse_data.py --video_dir {} --meta_dir {} --output_dir {}"
            print(importer.format(*places))
        else:
            write_dataset(settings)
            print(f"{folder}: {settings.num_samples} mice, rig {settings.rig}")


if __name__ == "__main__":
    main_guard(main)
