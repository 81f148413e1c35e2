"""Separates effects: trains every combination of some config values, for several seeds, and tabulates what each does.

  python scripts/ablate.py --spec configs/ablation_prompts_cameras_augmentation.yaml
Every run is an ordinary training in its own folder under the spec's output_dir. Repeating the command goes on: finished
runs are skipped, an interrupted one continues from its last checkpoint, a failed one is tried again. Leaves table.md
(cell means, main effects, interactions, each with its spread over seeds) and summary.json, renewed after every run.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.config import Parser
from multiview.run import main_guard


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, required=True, help="YAML; see configs/ablation_*.yaml")
    parser.add_argument("--dry_run", action="store_true", help="print the cells and their overrides, and stop")
    parser.add_argument("--only", default="", help="run only cells whose names hold this text (default: all)")
    arguments = parser.parse_args()
    from evaluation.ablation import as_arguments, make_cells, markdown, prepare, read_spec, run_cell, summarise
    from multiview.files import atomic_write, write_json
    from multiview.run import git_hash

    spec, results = read_spec(arguments.spec), []
    cells = make_cells(spec)
    chosen = {name: cell for name, cell in cells.items() if arguments.only in name}
    if not chosen:
        raise ValueError(f"--only {arguments.only!r} fits none of {', '.join(cells)}")
    if arguments.dry_run:
        for name, cell in chosen.items():
            print(f"{name}: {' '.join(as_arguments(cell['overrides']))}")
        print(f"{len(chosen)} runs of {spec.base}")
        return
    prepare(spec)
    table = Path(spec.output_dir) / "table.md"
    for name, cell in chosen.items():
        result = run_cell(spec, cell)  # one that fails does not stop the others
        results.append(result)
        told = f"failed: {result.get('reason')}"
        if result["status"] == "done":
            told = ", ".join(f"{metric} {result['metrics'][metric]:.3f}" for metric in spec.metrics)
        print(f"{len(results)} of {len(chosen)} {name} ({result['seconds']:.0f} s): {told}", flush=True)
        # After every run: an ablation of days can be read while it goes on.
        with atomic_write(table) as temporary:
            temporary.write_text(markdown(spec, results))
        summary = {"spec": vars(spec), **summarise(spec, results), "runs": results, "git": git_hash()}
        write_json(table.with_name("summary.json"), summary)
    print(table.read_text())
    failed = sum(result["status"] != "done" for result in results)
    if failed:
        raise ValueError(f"{failed} of {len(results)} runs failed; the reasons are in {table}")


if __name__ == "__main__":
    main_guard(main)
