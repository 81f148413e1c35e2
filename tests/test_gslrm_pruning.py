"""Pruning of the background: packed sequences against the dense model and an independent oracle."""

import pytest
import torch

from gslrm.model.gslrm import GSLRM, Attention
from gslrm.model.selection import select_patches
from multiview.cameras import Cameras
from tests import oracle_gslrm
from tests.test_gslrm import assert_same, rows_of, spread, tiny

SIZE = 16


def build(prune=True, *, seed=0, free=2, **changes) -> GSLRM:
    """A tiny model whose values spread."""
    torch.manual_seed(seed)
    return spread(GSLRM(tiny(prune_background_tokens=prune, gaussians={"n_gaussians": free}, **changes)))


def posed_views(batch=1, num_views=3):
    azimuths = torch.arange(batch * num_views).view(batch, num_views) * 47.0
    cameras = Cameras.orbit(azimuths, torch.full_like(azimuths, 20.0), 2.7, 1.07, SIZE)
    return torch.rand(batch, num_views, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), cameras


def blobs(batch=2):
    """Masks with different numbers of tokens per sample: four patches of sample 0, one of sample 1."""
    masks = torch.zeros(batch, 3, 1, SIZE, SIZE)
    masks[0, :2, :, 2:12, 3:6] = 1.0
    if batch > 1:
        masks[1, 1, :, 2:5, 3:5] = 1.0
    return masks


def grown(masks, margin_px):
    """[b, v, h, w] bool, pixel by pixel."""
    b, v, _, h, w = masks.shape
    kept = torch.zeros(b, v, h, w, dtype=torch.bool)
    for sample, view, _, y, x in (masks > 0.1).nonzero().tolist():
        top, left = max(y - margin_px, 0), max(x - margin_px, 0)
        kept[sample, view, top : y + margin_px + 1, left : x + margin_px + 1] = True
    return kept


@pytest.mark.parametrize("margin_px", [0, 1, 4])
def test_selection_keeps_exactly_the_foreground_and_its_margin(margin_px):
    masks = torch.zeros(2, 2, 1, 16, 24)
    masks[0, 0, 0, 5, 6] = 1.0
    masks[0, 1, 0, 12, 12] = 0.11
    masks[0, 1, 0, 2, 22] = 0.09  # below the threshold
    masks[1, 1, 0, 0, 23] = 1.0
    selection = select_patches(masks, 8, masks, margin_px)
    expected = grown(masks, margin_px)
    assert selection.pixels_per_sample == expected.flatten(1).sum(1).tolist()
    index = selection.pixel_index().split(selection.pixels_per_sample)
    for sample in range(2):
        assert sorted(index[sample].tolist()) == expected[sample].flatten().nonzero()[:, 0].tolist()
    patches = expected.view(2, 2, 2, 8, 3, 8).any(5).any(3)
    places = torch.stack([selection.sample, selection.view, selection.top // 8, selection.left // 8], 1)
    assert torch.equal(places, patches.nonzero())
    assert selection.patches_per_sample == patches.flatten(1).sum(1).tolist()


def test_full_masks_give_the_dense_model_and_its_gradients(batch=2):
    dense, pruned = build(prune=False), build()
    pruned.load_state_dict(dense.state_dict(), strict=True)
    images, cameras = posed_views(batch)
    outputs = [dense(images, cameras), pruned(images, cameras, masks=torch.ones(batch, 3, 1, SIZE, SIZE))]
    for output in outputs:
        rows_of(output.gaussians).sin().sum().backward()
    assert torch.equal(outputs[0].pixel_index, outputs[1].pixel_index) and outputs[1].pixel_valid.all()
    assert torch.equal(rows_of(outputs[0].gaussians), rows_of(outputs[1].gaussians))
    for (name, one), other in zip(dense.named_parameters(), pruned.parameters()):
        assert one.grad.abs().max() > 0 and torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("margin_px", [0, 3])
@torch.no_grad()
def test_pruned_samples_are_the_oracles_on_the_kept_patches_alone(margin_px):
    model = build(prune_margin_px=margin_px)
    images, cameras = posed_views(batch=2)
    output, kept = model(images, cameras, masks=blobs()), grown(blobs(), margin_px)
    rows = rows_of(output.gaussians)
    for sample in range(2):
        expected = oracle_gslrm.gaussians(model, images[sample], cameras[sample], kept=kept[sample])
        assert_same(rows[sample, : len(expected)], expected)
        assert output.pixel_valid[sample].sum() == len(expected) - 2
        assert (output.gaussians.get_opacity[sample, len(expected) :] < 1e-9).all()
    assert (~output.pixel_valid[1]).any() and torch.isfinite(rows).all()
    lengths = output.ray_directions.norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-6)


def test_a_sample_and_its_gradients_do_not_depend_on_the_others():
    images, cameras = posed_views(batch=2)
    masks, model = blobs(), build()
    for sample in range(2):
        one, gradients, results = slice(sample, sample + 1), [], []
        for chosen in (slice(None), one):
            model.zero_grad()
            output = model(images[chosen], cameras[chosen], masks=masks[chosen])
            row = sample if chosen != one else 0
            rows = rows_of(output.gaussians)[row][: 2 + int(output.pixel_valid[row].sum())]
            rows.sin().sum().backward()
            results.append(rows.detach())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert_same(results[0], results[1])
        assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()


@pytest.mark.parametrize("free, empty", [(2, "one"), (2, "all"), (0, "one"), (0, "all")])
def test_empty_masks_leave_the_free_gaussians(free, empty):
    model, masks = build(free=free), blobs()
    masks[0] = 0.0
    if empty == "all":
        masks[:] = 0.0
    images, cameras = posed_views(batch=2)
    output = model(images, cameras, masks=masks)
    assert not output.pixel_valid[0].any() and output.pixel_valid[1].any() == (empty == "one")
    rows = rows_of(output.gaussians)
    assert torch.isfinite(rows).all() and (output.gaussians.get_opacity[0, free:] < 1e-9).all()
    if free:
        expected = oracle_gslrm.gaussians(model, images[0], cameras[0], kept=torch.zeros(3, SIZE, SIZE, dtype=bool))
        assert_same(rows[0, :free], expected)
    rows.square().sum().backward()
    for name, parameter in model.named_parameters():  # distributed training wants a gradient of every one
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_background_pixels_have_no_influence():
    """Pixels of dropped patches are not even read; the rest of a kept patch is."""
    model, masks = build(), blobs(1)
    images, cameras = posed_views()
    with torch.no_grad():
        before = rows_of(model(images, cameras, masks=masks).gaussians)
        images[0, 2] = torch.nan
        after = rows_of(model(images, cameras, masks=masks).gaussians)
        images[0, 0, :, 0, 0] += 1.0  # in a kept patch, outside the grown mask
        changed = rows_of(model(images, cameras, masks=masks).gaussians)
    assert torch.equal(before, after) and (changed - before).abs().max() > 1e-4


def test_gradient_checkpointing_changes_no_gradient_of_a_pruned_batch():
    images, cameras = posed_views(batch=2)
    gradients = []
    for every in (0, 1, 2):
        model = build()
        model.grad_checkpoint_every = every
        rows_of(model(images, cameras, masks=blobs()).gaussians).sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_attention_needs_no_mask_of_all_pairs():
    """Packed sequences: the memory that autograd keeps grows with the tokens, not with the longest sample."""
    attention = Attention(32, 16)

    def saved_numbers(lengths):
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = attention(torch.rand(sum(lengths), 32), lengths)
        assert kept.shape == (sum(lengths), 32)
        return sum(seen.values())

    # Padded to the longest it would be 3.6 times as much, before a mask of all pairs.
    assert saved_numbers([200, 8, 8, 8]) <= 1.25 * saved_numbers([56, 56, 56, 56])


def test_autograd_keeps_no_patches_and_no_rays():
    """Of the 9 numbers per pixel that enter the network none is kept: only the directions that depth multiplies."""
    model, (images, cameras) = build(prune=False), posed_views()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = model(images, cameras)
    num_pixels = 3 * SIZE**2
    assert len(saved) > 20 and not [t for t in saved if t.shape[-1] in (9, 9 * 64) and t.numel() == 9 * num_pixels]
    per_pixel = [t for t in saved if t.shape == (num_pixels, 3)]
    assert sum(torch.equal(t, output.ray_directions[0]) for t in per_pixel) == 1
    assert len(per_pixel) == 2  # the other: log-scales before they are capped
