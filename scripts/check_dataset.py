"""Checks a dataset of posed, masked views: do pictures, masks and cameras belong together, and what is wrong if not?

Takes any folder of samples (<sample>/opencv_cameras.json and its pictures), FaceLift's included, a split list (also
FaceLift's, with absolute paths) or one sample. Writes quality_report.html (one file, for eyes) and quality_report.json
(for programs) with a grade, its reasons and what to do about each. Without a dataset.json the rig is measured and
described; distance and focal length are then compared with what FaceLift's released weights expect.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--data", required=True, type=Path, help="split list, dataset folder or sample folder")
    parser.add_argument("--output_dir", required=True, type=Path, help="where the two reports go")
    parser.add_argument("--rig", default=None, help="rig the views should be; left out: what dataset.json says")
    parser.add_argument("--num_samples", type=int, default=200, help="looked at, evenly spaced over the dataset")
    parser.add_argument(
        "--num_views",
        type=int,
        default=None,
        help="first views of each sample; left out: the rig's, or at most 12",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes; the result does not depend on it")
    parser.add_argument(
        "--fail_below", choices=("usable", "good"), default=None, help="exit with 1 when the grade is worse than this"
    )
    parsed = parser.parse_args(arguments)
    for name, least in (("num_samples", 1), ("num_views", 1), ("workers", 1)):
        value = getattr(parsed, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return parsed


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from recording.quality.findings import GRADES
    from recording.quality.report import HTML_NAME, check_dataset

    report = check_dataset(
        options.data, options.output_dir, rig=options.rig, num_samples=options.num_samples,
        num_views=options.num_views, workers=options.workers, progress=True,
    )  # fmt: skip
    print(f"{report['num_samples']} of {report['dataset_samples']} samples, {report['num_views']} views each")
    for view in report["views"]:
        overlap = "" if view["silhouette_iou"] is None else f"  IoU from the others {view['silhouette_iou']:.3f}"
        print(
            f"  {view['name']:<18} az {view['azimuth_deg']:6.1f}  el {view['elevation_deg']:5.1f}  "
            f"d {view['distance_mean']:.3f}  focal/width {view['focal']:.4f}{overlap}"
        )
    print(f"quality: {report['grade']}; see {options.output_dir / HTML_NAME}")
    for finding in report["findings"]:
        print(f"  {finding['severity']}: {finding['what']}\n    -> {finding['remedy']}")
    if options.fail_below is not None and GRADES.index(report["grade"]) < GRADES.index(options.fail_below):
        raise ValueError(f"the dataset is {report['grade']}, --fail_below {options.fail_below}")


if __name__ == "__main__":
    main_guard(main)
