"""GS-LRM: posed views -> tokens -> transformer -> Gaussians. Forward only: no loss, no rendering, no files.

    images + rays -> kept patches -> Linear --+
                          n learned tokens ---+-> LayerNorm -> blocks -> heads -> one Gaussian per pixel + n free

Pre-norm blocks without a single bias, full attention over all tokens of all views. Tokens are packed, the rows of all
samples one after the other, as pruning leaves different numbers of them: linear layers and norms run over all rows,
attention over each sample's own. Parameter names are those of FaceLift's public weights (docs/conventions.md).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gslrm.config import ModelConfig
from gslrm.model.gaussians import Gaussians
from gslrm.model.selection import PatchSelection, pad_rows, select_patches
from multiview.cameras import Cameras

INIT_STD = 0.02
SCALING_OFFSET, SCALING_MAX = -2.3, -1.20  # log-scale = min(prediction + offset, max)
OPACITY_OFFSET = -2.0  # logit
ABSENT_OPACITY = -30.0  # logit of padding Gaussians: far below the rasterizers' 1/255 cut
DEPTH_HALF_RANGE = 1.8  # world units around the point of the ray nearest the origin
PLAIN_DEPTH_HALF_RANGE, PLAIN_DEPTH_CENTER = 1.5, 2.7
# Values of the rows that pad a sample with fewer Gaussians than another of its batch: harmless and not rendered.
PADDING = {"xyz": 0.0, "features": 0.0, "scaling": SCALING_OFFSET, "rotation": 1.0, "opacity": ABSENT_OPACITY}


@dataclass(frozen=True)
class GSLRMOutput:
    """Raw Gaussians [b, n_free + k]: the free ones first, then k image Gaussians. Without pruning k = v*h*w in the
    order (view, patch row, patch column, row in patch, column in patch)."""

    gaussians: Gaussians
    pixel_index: Tensor  # [b, k] int64, the pixel (view*h + row)*w + column that each image Gaussian belongs to
    pixel_valid: Tensor  # [b, k] bool; False: padding of opacity 0 (pruned samples have different numbers)
    ray_origins: Tensor  # [b, k, 3] world
    ray_directions: Tensor  # [b, k, 3] world, of unit length
    n_free: int
    shape: tuple[int, int, int]  # (v, h, w) of the input views

    @property
    def pixel_xyz(self) -> Tensor:
        """[b, k, 3] positions of the image Gaussians, world."""
        return self.gaussians.xyz[:, self.n_free :]


class Attention(nn.Module):
    """Multi-head self-attention; one matrix makes q, k, v in that order, the head index runs slow."""

    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        if d % d_head:
            raise ValueError(f"model.transformer: d must be a multiple of d_head, got d {d}, d_head {d_head}")
        self.d_head = d_head
        self.to_qkv = nn.Linear(d, 3 * d, bias=False)
        self.fc = nn.Linear(d, d, bias=False)

    def forward(self, tokens: Tensor, lengths: list[int] | int) -> Tensor:
        """tokens: [T, d], the samples one after the other, which do not mix; lengths: of each, or the one of all."""
        qkv = run_linear(self.to_qkv, tokens).unflatten(-1, (3, -1, self.d_head))  # [T, 3, heads, d_head]
        equal, attended = isinstance(lengths, int), []
        for batch in [qkv.unflatten(0, (-1, lengths))] if equal else [x[None] for x in qkv.split(lengths)]:
            query, key, value = batch.permute(2, 0, 3, 1, 4)  # each [b, heads, n, d_head]
            values = functional.scaled_dot_product_attention(query, key, value)
            attended.append(values.transpose(1, 2).flatten(2).flatten(0, 1))
        return run_linear(self.fc, attended[0] if equal else torch.cat(attended))


def run_linear(layers: nn.Linear | nn.Sequential, tokens: Tensor) -> Tensor:
    """`layers(tokens)`, tokens [T, d]; inference in float32 on a CPU through oneDNN's layout: the same products,
    rounded differently, up to twice as fast. Only torch's own layers: an adapter around one runs as it is."""
    parts = layers if isinstance(layers, nn.Sequential) else (layers,)
    plain = tokens.device.type == "cpu" and tokens.dtype == torch.float32 and len(tokens) > 0
    watched = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if plain and not watched and torch.backends.mkldnn.is_available():
        if all(type(part) in (nn.Linear, nn.GELU) for part in parts):
            return layers(tokens.to_mkldnn()).to_dense()
    return layers(tokens)


class TransformerBlock(nn.Module):
    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, bias=False)
        self.attn = Attention(d, d_head)
        self.norm2 = nn.LayerNorm(d, bias=False)
        layers = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False))
        self.mlp = nn.ModuleDict({"mlp": layers})  # FaceLift's names: mlp.mlp.0

    def forward(self, tokens: Tensor, lengths: list[int] | int) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), lengths)
        return tokens + run_linear(self.mlp["mlp"], self.norm2(tokens))


def run_blocks(blocks: nn.ModuleList, tokens: Tensor, lengths: list[int], checkpoint_every: int) -> Tensor:
    """Runs the blocks on packed tokens [T, d] whose samples have `lengths` tokens (sum T); with `checkpoint_every` k >
    0 groups of k blocks are recomputed in the backward pass."""
    told = lengths[0] if lengths[0] and len(set(lengths)) == 1 else lengths  # compared inside, each would be compiled

    def run_group(start: int, tokens: Tensor) -> Tensor:
        for block in blocks[start : start + step]:
            tokens = block(tokens, told)
        return tokens

    # Without it one by one: a longer group's caller would hold on to the group's input.
    checkpointing = checkpoint_every > 0 and torch.is_grad_enabled()
    step = checkpoint_every if checkpointing else 1
    run = partial(checkpoint, run_group, use_reentrant=False) if checkpointing else run_group
    for start in range(0, len(blocks), step):
        tokens = run(start, tokens)
    return tokens


class GSLRM(nn.Module):
    """The reconstruction transformer; grad_checkpoint_every as in `run_blocks`."""

    def __init__(self, config: ModelConfig, *, grad_checkpoint_every: int = 0) -> None:
        super().__init__()
        self.config, self.grad_checkpoint_every = config, grad_checkpoint_every
        d, p = config.transformer.d, config.image_tokenizer.patch_size
        channels, given = 12 if config.use_aug_plucker and not config.use_custom_plucker else 9, config.image_tokenizer
        if given.in_channels != channels:
            told = f"must be {channels} for the chosen ray input, got {given.in_channels}"
            raise ValueError(f"model.image_tokenizer.in_channels {told}")
        if config.prune_margin_px < 0:
            raise ValueError(f"model.prune_margin_px must be at least 0, got {config.prune_margin_px}")
        self.sizes = [3, 3 * (config.gaussians.sh_degree + 1) ** 2, 3, 4, 1]  # of the values in PADDING
        num_values = sum(self.sizes)

        # A patch is flattened in the order (row, column, channel).
        self.patch_embedder = nn.Sequential(nn.Flatten(), nn.Linear(channels * p * p, d, bias=False))
        if config.add_refsrc_marker:
            self.view_type_embeddings = nn.Parameter(torch.empty(2, d))
        self.gaussian_position_embeddings = nn.Parameter(torch.empty(config.gaussians.n_gaussians, d))
        self.input_layer_norm = nn.LayerNorm(d, bias=False)
        blocks = (TransformerBlock(d, config.transformer.d_head) for _ in range(config.transformer.n_layer))
        self.transformer_layers = nn.ModuleList(blocks)
        head = {"layernorm": nn.LayerNorm(d, bias=False), "linear": nn.Linear(d, num_values, bias=False)}
        self.gaussian_upsampler = nn.Sequential(OrderedDict(head))
        pixels = nn.Linear(d, p * p * num_values, bias=False)
        self.pixel_gaussian_decoder = nn.Sequential(nn.LayerNorm(d, bias=False), pixels)
        for module in self.modules():  # norms are 1 as they come
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
        for name in ("gaussian_position_embeddings", "view_type_embeddings"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=INIT_STD)

    def forward(
        self, images: Tensor, cameras: Cameras, *, masks: Tensor | None = None, clip_xyz: bool = False
    ) -> GSLRMOutput:
        """Predicts Gaussians from posed views. Raises ValueError when shapes do not go together.

        images: [b, v, 3, h, w] RGB in 0..1 (composited); h, w multiples of the patch size. cameras: [b, v], of h x w.
        masks: [b, v, 1, h, w] foreground in 0..1, may be empty; needed if and only if background tokens are pruned.
        clip_xyz: image Gaussians into [-1, 1] (training with `config.clip_xyz`; never at inference).
        """
        p = self.config.image_tokenizer.patch_size
        if images.ndim != 5 or images.shape[2] != 3 or images.shape[3] % p or images.shape[4] % p:
            raise ValueError(f"images must be [b, v, 3, h, w], h and w multiples of {p}, got {list(images.shape)}")
        b, v, _, h, w = images.shape
        if tuple(cameras.shape) != (b, v) or (cameras.height, cameras.width) != (h, w):
            told = f"shape [{b}, {v}] for images {h} x {w} to go with images {list(images.shape)}"
            got = f"{list(cameras.shape)} for {cameras.height} x {cameras.width}"
            raise ValueError(f"cameras must have {told}, got {got}")
        if (masks is not None) != (prune := self.config.prune_background_tokens):
            got = "are given" if masks is not None else "are missing"
            raise ValueError(f"masks {got} but model.prune_background_tokens is {prune}: only pruning needs masks")
        if masks is not None and masks.shape != (b, v, 1, h, w):
            raise ValueError(f"masks must be [{b}, {v}, 1, {h}, {w}], got {list(masks.shape)}")
        selection = select_patches(images, p, masks, self.config.prune_margin_px)
        n_free, counts = self.config.gaussians.n_gaussians, selection.patches_per_sample
        lengths, every = [n_free + count for count in counts], self.grad_checkpoint_every
        tokens = run_blocks(self.transformer_layers, self._embed(images, cameras, selection), lengths, every)
        # Heads in full precision: a depth rounded to bf16 moves a point by up to 5e-2 along its ray.
        with torch.autocast(tokens.device.type, enabled=False):
            parts = tokens.split([size for count in counts for size in (n_free, count)])
            image = parts[1] if len(parts) == 2 else torch.cat(parts[1::2])
            values = self.pixel_gaussian_decoder(image.float()).view(-1, sum(self.sizes))
            free, values = self.gaussian_upsampler(torch.stack(parts[::2]).float()), selection.pixels_of(values)
            del tokens, parts, image  # as large as the Gaussians
            return self._decode(free, values, cameras, selection, clip_xyz)

    def _embed(self, images: Tensor, cameras: Cameras, selection: PatchSelection) -> Tensor:
        """Packed tokens [T', d] after the input norm: of each sample its free tokens, then its patches."""
        if torch.is_grad_enabled():  # the backward pass makes rays and patches again instead of keeping them
            options = {"use_reentrant": False, "preserve_rng_state": False}
            patches = checkpoint(self._embed_patches, images, cameras, selection, **options)
        else:
            patches = self._embed_patches(images, cameras, selection)
        free, samples = self.gaussian_position_embeddings.to(patches), patches.split(selection.patches_per_sample)
        return self.input_layer_norm(torch.cat([part for sample in samples for part in (free, sample)]))

    def _embed_patches(self, images: Tensor, cameras: Cameras, selection: PatchSelection) -> Tensor:
        """[T, d]: the linear embedding of the kept patches: colors in -1..1 and rays, [T, p, p, 9|12]."""
        with torch.autocast(images.device.type, enabled=False):  # rays in bf16 would miss their pixels
            origins, directions = selection.rays(cameras)
            origins = origins[:, None, None].expand_as(directions)
            parts = [selection.patches_of(images) * 2.0 - 1.0]
            if not self.config.use_custom_plucker:
                parts.append(torch.linalg.cross(origins, directions, dim=-1))
            parts.append(directions)
            if self.config.use_custom_plucker or self.config.use_aug_plucker:
                parts.append(origins + nearest_depth(origins, directions) * directions)
            posed = directions.new_empty(*directions.shape[:-1], 3 * len(parts))
            for i, part in enumerate(parts):  # torch.cat of threes takes three times as long
                posed[..., 3 * i : 3 * i + 3] = part
        tokens = self.patch_embedder(posed)
        if self.config.add_refsrc_marker:
            tokens = tokens + self.view_type_embeddings[selection.view.clamp(max=1)]
        return tokens

    def _decode(
        self, free: Tensor, image: Tensor, cameras: Cameras, selection: PatchSelection, clip_xyz: bool
    ) -> GSLRMOutput:
        """Head outputs, free [b, n_free, D] and packed image pixels [K, D], as Gaussians, free ones first."""
        counts, modifier = selection.pixels_per_sample, self.config.gaussians.scaling_modifier
        origins, directions = selection.rays(cameras)
        origins = selection.pixels_of(origins[:, None, None].expand_as(directions).reshape(-1, 3))
        directions = selection.pixels_of(directions.view(-1, 3))
        first, values = (dict(zip(PADDING, part.split(self.sizes, dim=-1))) for part in (free, image))
        if self.config.hard_pixelalign:
            sigma = torch.sigmoid(values["xyz"].mean(-1, keepdim=True) + self.config.depth_preact_bias)
            values["xyz"] = origins + self._depth(sigma, origins, directions) * directions
            if clip_xyz:
                values["xyz"] = values["xyz"].clamp(-1.0, 1.0)
        for part in (first, values):
            part["features"] = part["features"].unflatten(-1, (-1, 3))
            part["scaling"] = (part["scaling"] + SCALING_OFFSET).clamp(max=SCALING_MAX)
            if modifier:
                part["scaling"] = part["scaling"] + math.log(modifier)
            part["opacity"] = part["opacity"] + OPACITY_OFFSET
        index = selection.pixel_index()
        valid = pad_rows(torch.ones_like(index, dtype=torch.bool), counts, False)
        ray_directions = pad_rows(directions, counts, 0.0)
        if len(directions) < valid.numel():  # padding has the first pixel's number, so it gets a ray of that view
            ray_directions = torch.where(valid[..., None], ray_directions, cameras.c2w[:, :1, :3, 2])
        tensors = {name: torch.cat([first[name], pad_rows(values[name], counts, PADDING[name])], 1) for name in PADDING}
        return GSLRMOutput(
            Gaussians(**tensors), pad_rows(index, counts, 0), valid, pad_rows(origins, counts, 0.0), ray_directions,
            free.shape[1], selection.shape,
        )  # fmt: skip

    def _depth(self, sigma: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
        """Distance along the ray [K, 1] from sigma in 0..1."""
        config = self.config
        if config.use_custom_plucker or config.use_aug_plucker:
            return (2.0 * sigma - 1.0) * DEPTH_HALF_RANGE + nearest_depth(origins, directions)
        if config.depth_min > 0 and config.depth_max > 0:
            return sigma * (config.depth_max - config.depth_min) + config.depth_min
        if config.depth_reference_origin:
            return (2.0 * sigma - 1.0) * DEPTH_HALF_RANGE + origins.norm(dim=-1, keepdim=True)
        return (2.0 * sigma - 1.0) * PLAIN_DEPTH_HALF_RANGE + PLAIN_DEPTH_CENTER


def nearest_depth(origins: Tensor, directions: Tensor) -> Tensor:
    """Where on its ray the point nearest the world origin lies: [..., 3] twice -> [..., 1]."""
    return -(origins * directions).sum(-1, keepdim=True)
