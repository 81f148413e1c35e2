"""Measures Stage 1, Stage 2 or both together on held-out samples, beside baselines from the same run.

  1     the input view -> generated views, against the sample's other rig views
  2     the sample's true rig views -> Gaussians, rendered from its extra views, which were never inputs
  full  the input view -> generated views -> Gaussians, rendered from the extra views and from the other rig views
Writes metrics.json, table.md, report.html (self-contained), sheet.png (the first mice) and worst.png (the worst 5 %).
foreground_*: inside the true mask. depth_error: world units, where truth and prediction both show a surface.

Baselines (--baselines): copy, the input view as every view; nearest, the training mouse (--train_data) whose input view
is most like this one; hull, the visual hull of the views that Stage 2 gets, in their colors; six_views, what Stage 2
makes of the true rig views (for both stages: an upper bound); autoencoder, the true views only encoded and decoded (for
stage 1: an upper bound). The report says what each was given.

Sweeps: each list given is measured on its own, the others at no noise, all views and no filter. Noise (stage 2) is put
on the cameras that the model is told; the true ones stay for rendering. Of k input views (stage 2) those are taken that
stand farthest apart, the reference view among them. Filters (stages 2 and full) act on the Gaussians; tune them on a
validation list. A table and a plot (sweep_<flag>.png) per list.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation import EvaluationSettings
from multiview.config import Parser, add_fields, from_arguments
from multiview.run import main_guard
from pipeline.options import Checkpoints, Stage1Options, parse_with_overrides


def main() -> None:
    parser = Parser(description=__doc__)
    add_fields(parser, EvaluationSettings)
    add_fields(parser, Checkpoints)
    arguments, options = parse_with_overrides(parser, Stage1Options)
    try:
        settings = from_arguments(EvaluationSettings, arguments)
    except ValueError as error:
        parser.error(str(error))
    from evaluation.evaluate import evaluate
    from multiview.run import check_output_folder
    from pipeline import MouseFaceLift

    check_output_folder(settings.output_dir)
    model = MouseFaceLift.load(
        device=settings.device, stages=settings.stage, options=options, **vars(from_arguments(Checkpoints, arguments))
    )
    print(evaluate(settings, model))
    print(settings.output_dir)


if __name__ == "__main__":
    main_guard(main)
