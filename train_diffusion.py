"""Train Stage 1 (UNet: one image of an animal to N views). Repeating the command resumes it.

python train_diffusion.py --config configs/adapt_demo_mvdiffusion.yaml --data data_mine
python train_diffusion.py --config configs/mouse_mvdiffusion.yaml --overfit 1
torchrun --nproc_per_node 4 train_diffusion.py --config configs/mouse_mvdiffusion.yaml
"""

from multiview.config import config_to_yaml, training_arguments
from multiview.run import main_guard


def main() -> None:
    arguments = training_arguments(__doc__, "mvdiffusion/config.py", "learning_rate=1e-5")
    from mvdiffusion.facelift_yaml import dataset_overrides, load_training_config

    config = load_training_config(arguments.config, arguments.overrides)
    if arguments.data:  # what is typed wins over what the dataset asks for
        config = load_training_config(arguments.config, dataset_overrides(config, arguments.data) + arguments.overrides)
    if arguments.dry_run:
        print(config_to_yaml(config), end="")
        return
    from mvdiffusion.training import train

    print(f"checkpoints, metrics.jsonl, summary.json and images: {train(config, arguments.overfit)}")


if __name__ == "__main__":
    main_guard(main)
