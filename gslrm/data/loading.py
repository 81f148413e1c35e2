"""The data of a Stage 2 run: its datasets and this process's share of the global batches."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from gslrm.config import GSLRMConfig
from gslrm.data.mouse_dataset import MouseViewDataset, StepSampler
from multiview.run import Distributed


def build_datasets(config: GSLRMConfig, overfit: int) -> tuple[MouseViewDataset, MouseViewDataset | None]:
    """Training data, and validation data (every view of each sample, fixed inputs) unless validation is off."""
    options, losses = config.training.dataset, config.training.losses
    common = {
        "image_size": config.model.image_tokenizer.image_size,
        "num_input_views": options.num_input_views,
        "on_bad_sample": options.on_bad_sample,
        "seed": config.training.runtime.seed,
    }
    dataset = MouseViewDataset(
        options.dataset_path,
        num_views=options.num_views,
        target_has_input=options.target_has_input,
        random_views=options.random_view_selection,
        maximize_view_overlap=options.maximize_view_overlap,
        overlap_rule=options.overlap_rule,
        background=options.background_color,
        augmentation=options.augmentation,
        with_depth=losses.direct_loss_weight > 0,
        limit=overfit or None,
        **common,
    )
    if overfit > len(dataset):
        raise ValueError(f"--overfit {overfit} needs {overfit} samples, {options.dataset_path} has {len(dataset)}")
    if not config.validation.enabled:
        return dataset, None
    background = "white" if options.background_color == "random" else options.background_color
    return dataset, MouseViewDataset(
        config.validation.dataset_path, num_views=None, background=background,
        limit=config.validation.num_samples, **common,
    )  # fmt: skip


def build_loader(
    dataset: MouseViewDataset, config: GSLRMConfig, processes: Distributed, *, start: int, stop: int
) -> DataLoader:
    """This process's share of the global batches of passes start ... stop - 1."""
    options = config.training.dataloader
    sampler = StepSampler(
        config.training.runtime.seed, len(dataset), batch_size=options.batch_size_per_gpu,
        rank=processes.rank, world_size=processes.world_size, start=start, stop=stop,
    )  # fmt: skip
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=options.num_workers, pin_memory=torch.cuda.is_available(),
        prefetch_factor=options.prefetch_factor if options.num_workers else None,
    )  # fmt: skip
