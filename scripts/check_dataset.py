"""Checks a dataset of posed, masked views: do images, masks and cameras belong together, and what is wrong if not?

Takes any folder of samples (<sample>/opencv_cameras.json and its images), FaceLift's included, a split list (also
FaceLift's, with absolute paths) or one sample. Writes quality_report.html (one file, for eyes) and quality_report.json
(for programs) with a grade, its reasons and what to do about each. Without a dataset.json the rig is measured and
described; distance and focal length are then compared with what FaceLift's released weights expect.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser, add_fields, from_arguments, option
from multiview.run import check_output_folder, main_guard


@dataclass(frozen=True)
class CheckSettings:
    """Flags of this script."""

    data: Path = option(..., "split list, dataset folder or sample folder")
    output_dir: Path = option(..., "where the two reports go")
    rig: str | None = option(None, "rig the views should be; left out: what dataset.json says")
    num_samples: int = option(200, "looked at, evenly spaced over the dataset", least=1)
    num_views: int | None = option(None, "first views of each sample; left out: the rig's, or at most 12", least=1)
    workers: int = option(2, "threads; the result does not depend on it", least=1)
    fail_below: str | None = option(None, "exit with 1 when the grade is worse", choices=("usable", "good"))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_fields(parser, CheckSettings)
    settings = from_arguments(CheckSettings, parser.parse_args(arguments))
    check_output_folder(settings.output_dir)
    from recording.quality.findings import GRADES
    from recording.quality.report import HTML_NAME, check_dataset

    report = check_dataset(
        settings.data, settings.output_dir, rig=settings.rig, num_samples=settings.num_samples,
        num_views=settings.num_views, workers=settings.workers, progress=True,
    )  # fmt: skip
    print(f"{report['num_samples']} of {report['dataset_samples']} samples, {report['num_views']} views each")
    for view in report["views"]:
        overlap = "" if view["silhouette_iou"] is None else f"  IoU from the others {view['silhouette_iou']:.3f}"
        print(
            f"  {view['name']:<18} az {view['azimuth_deg']:6.1f}  el {view['elevation_deg']:5.1f}  "
            f"d {view['distance_mean']:.3f}  focal/width {view['focal']:.4f}{overlap}"
        )
    print(f"quality: {report['grade']}; see {settings.output_dir / HTML_NAME}")
    for finding in report["findings"]:
        print(f"  {finding['severity']}: {finding['what']}\n    -> {finding['remedy']}")
    if settings.fail_below is not None and GRADES.index(report["grade"]) < GRADES.index(settings.fail_below):
        raise ValueError(f"the dataset is {report['grade']}, --fail_below {settings.fail_below}")


if __name__ == "__main__":
    main_guard(main)
