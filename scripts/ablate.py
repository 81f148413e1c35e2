"""Separates effects: trains every combination of some config values, for several seeds, and tabulates what each does.

  python scripts/ablate.py --spec configs/ablation_prompts_cameras_augmentation.yaml
Every run is an ordinary training in its own folder under the spec's output_dir. Repeating the command goes on: finished
runs are skipped, an interrupted one continues from its last checkpoint, a failed one is tried again. Leaves table.md
(cell means, main effects, interactions, each with its spread over seeds) and summary.json, renewed after every run.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from multiview.run import main_guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, required=True, help="YAML; see configs/ablation_*.yaml")
    parser.add_argument("--dry_run", action="store_true", help="print the cells and their overrides, and stop")
    parser.add_argument("--only", default="", help="run only cells whose names hold this text (default: all)")
    arguments = parser.parse_args()
    from evaluation.ablation import check_cells, make_cells, markdown, prepare, read_spec, run_cells, summarise
    from multiview.files import atomic_write, write_json
    from multiview.run import git_hash

    spec = read_spec(arguments.spec)
    cells = make_cells(spec)
    check_cells(spec, cells)  # all of them, before the first of many hours
    chosen = [cell for cell in cells if arguments.only in cell.name]
    if not chosen:
        raise ValueError(f"--only {arguments.only!r} fits none of {', '.join(cell.name for cell in cells)}")
    if arguments.dry_run:
        for cell in chosen:
            print(f"{cell.name}: {' '.join(cell.arguments())}")
        print(f"{len(chosen)} runs of {spec.base}")
        return
    prepare(spec)
    levels = {factor: list(named) for factor, named in spec.factors.items()}
    folder, results = Path(spec.output_dir), []

    def on_cell(cell, result: dict) -> None:
        results.append(result)
        if result["status"] == "done":
            figures = ", ".join(f"{name} {result['metrics'][name]:.3f}" for name in spec.metrics)
        else:
            figures = f"failed: {result['reason']}"
        print(f"{len(results)} of {len(chosen)} {cell.name} ({result['seconds']:.0f} s): {figures}", flush=True)
        # After every run: an ablation of days can be read while it goes on.
        with atomic_write(folder / "table.md") as temporary:
            temporary.write_text(markdown(results, levels, spec.metrics, spec.seeds))
        summary = summarise(results, levels, spec.metrics, spec.seeds)
        write_json(folder / "summary.json", {"spec": asdict(spec), **summary, "runs": results, "git": git_hash()})

    run_cells(spec, chosen, on_cell)
    print((folder / "table.md").read_text())
    failed = sum(result["status"] != "done" for result in results)
    if failed:
        raise ValueError(f"{failed} of {len(results)} runs failed; the reasons are in {folder / 'table.md'}")


if __name__ == "__main__":
    main_guard(main)
