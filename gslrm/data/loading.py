"""The data of a Stage 2 run: its datasets and this process's share of the global batches."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from gslrm.config import GSLRMConfig, mix_percents
from gslrm.data.mixing import MixedDataset
from gslrm.data.mouse_dataset import MouseViewDataset
from multiview.order import HUNDREDTHS, StepSampler
from multiview.run import Distributed, seed_from


def build_datasets(
    config: GSLRMConfig, overfit: int
) -> tuple[MouseViewDataset | MixedDataset, MouseViewDataset | None]:
    """Training data, and validation data (every view of each sample, fixed inputs) unless validation is off.

    overfit: N > 0 takes the first N samples of `dataset_path` alone, without the datasets of `mix`.
    """
    options, seed = config.training.dataset, config.training.runtime.seed
    dataset = training_dataset(config, options.dataset_path, seed=seed, limit=overfit or None)
    if overfit > len(dataset):
        raise ValueError(f"--overfit {overfit} needs {overfit} samples, {options.dataset_path} has {len(dataset)}")
    if options.mix and not overfit:
        others = [
            training_dataset(config, part.dataset_path, seed=seed_from("gslrm-mix", seed, number))
            for number, part in enumerate(options.mix, start=1)
        ]
        dataset = MixedDataset([dataset, *others], mix_percents(options))
    if not config.validation.enabled:
        return dataset, None
    return dataset, MouseViewDataset(
        config.validation.dataset_path,
        image_size=config.model.image_tokenizer.image_size,
        num_input_views=options.num_input_views,
        num_views=None,
        background="white" if options.background_color == "random" else options.background_color,
        on_bad_sample=options.on_bad_sample,
        seed=seed,
        limit=config.validation.num_samples,
    )


def training_dataset(
    config: GSLRMConfig, list_file: str, *, seed: int, limit: int | None = None
) -> MouseViewDataset:
    options = config.training.dataset
    return MouseViewDataset(
        list_file,
        image_size=config.model.image_tokenizer.image_size,
        num_input_views=options.num_input_views,
        num_views=options.num_views,
        target_has_input=options.target_has_input,
        random_views=options.random_view_selection,
        maximize_view_overlap=options.maximize_view_overlap,
        overlap_rule=options.overlap_rule,
        background=options.background_color,
        augmentation=options.augmentation,
        with_depth=config.training.losses.direct_loss_weight > 0,
        on_bad_sample=options.on_bad_sample,
        seed=seed,
        limit=limit,
    )


def build_loader(
    dataset: MouseViewDataset | MixedDataset, config: GSLRMConfig, processes: Distributed, *, start: int, stop: int
) -> DataLoader:
    """This process's share of the global batches of passes start ... stop - 1."""
    options, seed = config.training.dataloader, config.training.runtime.seed
    mixed = isinstance(dataset, MixedDataset)
    lengths, percents = (dataset.lengths, dataset.percents) if mixed else ([len(dataset)], [HUNDREDTHS])
    sampler = StepSampler(
        lengths, options.batch_size_per_gpu, seed=seed, percents=percents,
        rank=processes.rank, world_size=processes.world_size, start=start, stop=stop,
    )  # fmt: skip
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=options.num_workers, pin_memory=torch.cuda.is_available(),
        prefetch_factor=options.prefetch_factor if options.num_workers else None,
    )  # fmt: skip
