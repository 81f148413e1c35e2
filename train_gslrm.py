"""Train Stage 2 (GS-LRM: posed views to Gaussians). Repeating the command resumes it.

python train_gslrm.py --config configs/adapt_demo.yaml --data data_mine
python train_gslrm.py --config configs/mouse_config_finetune.yaml --overfit 10
torchrun --nproc_per_node 4 train_gslrm.py --config configs/mouse_config_finetune.yaml
"""

from multiview.config import config_to_yaml, load_config, training_arguments
from multiview.run import main_guard


def main() -> None:
    arguments = training_arguments(__doc__, "gslrm/config.py", "training.optimizer.lr=1e-5")
    from gslrm.config import IGNORED_KEYS, GSLRMConfig, dataset_overrides

    config = load_config(GSLRMConfig, arguments.config, arguments.overrides, ignored=set(IGNORED_KEYS))
    if arguments.data:  # what is typed wins over what the dataset asks for
        overrides = dataset_overrides(config, arguments.data) + arguments.overrides
        config = load_config(GSLRMConfig, arguments.config, overrides, ignored=set(IGNORED_KEYS))
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return
    from gslrm.training import train

    print(f"checkpoints, metrics.jsonl, summary.json and images: {train(config, arguments.overfit)}")


if __name__ == "__main__":
    main_guard(main)
