"""GS-LRM: posed views -> tokens -> transformer -> Gaussians. Forward only: no loss, no rendering, no files.

    images + rays -> patches -> Linear --+
                     n learned tokens ---+-> LayerNorm -> blocks -> heads -> one Gaussian per pixel + n free

Parameter names and numbers are those of FaceLift's public weights (docs/conventions.md says which facts that fixes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from gslrm.config import ModelConfig
from gslrm.model.gaussians import Gaussians
from gslrm.model.transformer import INIT_STD, TransformerBlock, init_weights, run_blocks
from multiview.cameras import Cameras

SCALING_OFFSET, SCALING_MAX = -2.3, -1.20  # log-scale = min(prediction + offset, max)
OPACITY_OFFSET = -2.0  # logit
ABSENT_OPACITY = -30.0  # logit of padding Gaussians: far below the rasterizers' 1/255 cut
DEPTH_HALF_RANGE = 1.8  # world units around the point of the ray nearest the origin
PLAIN_DEPTH_HALF_RANGE, PLAIN_DEPTH_CENTRE = 1.5, 2.7


@dataclass(frozen=True)
class GSLRMOutput:
    """What a forward pass gives.

    gaussians: raw values [b, n_free + k]: the free Gaussians first, then k image Gaussians. Without pruning
        k = v*h*w in the order (view, patch row, patch column, row in patch, column in patch).
    pixel_index: [b, k] int64, the pixel (view*h + row)*w + column that each image Gaussian belongs to.
    pixel_valid: [b, k] bool; False marks padding (pruned samples have different numbers of Gaussians): opacity 0.
    ray_origins, ray_directions: [b, k, 3] world, directions of unit length.
    n_free: number of free Gaussians.
    shape: (v, h, w) of the input views.
    """

    gaussians: Gaussians
    pixel_index: Tensor
    pixel_valid: Tensor
    ray_origins: Tensor
    ray_directions: Tensor
    n_free: int
    shape: tuple[int, int, int]

    @property
    def pixel_xyz(self) -> Tensor:
        """[b, k, 3] positions of the image Gaussians, world."""
        return self.gaussians.xyz[:, self.n_free :]

    def to_pixels(self, values: Tensor) -> Tensor:
        """[b, k, c] values of image Gaussians -> [b, v, h, w, c]; pixels without a Gaussian hold 0."""
        b, _, c = values.shape
        v, h, w = self.shape
        canvas = values.new_zeros(b, v * h * w + 1, c)  # the extra pixel takes the padding
        index = torch.where(self.pixel_valid, self.pixel_index, v * h * w)
        canvas = canvas.scatter(1, index[..., None].expand(-1, -1, c), values)
        return canvas[:, :-1].view(b, v, h, w, c)


class Patchify(nn.Module):
    """[b, v, c, h, w] -> [b, v*tokens, p*p*c]; inside a patch (row, column, channel)."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        return rearrange(images, "b v c (hh ph) (ww pw) -> b (v hh ww) (ph pw c)", ph=p, pw=p)


class FreeGaussianHead(nn.Module):
    def __init__(self, d: int, num_values: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(d, bias=False)
        self.linear = nn.Linear(d, num_values, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.layernorm(tokens))


class GSLRM(nn.Module):
    """The reconstruction transformer.

    grad_checkpoint_every: blocks recomputed together in the backward pass (saves memory); 0 = off.
    """

    def __init__(self, config: ModelConfig, *, grad_checkpoint_every: int = 0) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint_every = grad_checkpoint_every
        d, p = config.transformer.d, config.image_tokenizer.patch_size
        expected_channels = 12 if config.use_aug_plucker and not config.use_custom_plucker else 9
        if config.image_tokenizer.in_channels != expected_channels:
            raise ValueError(
                f"model.image_tokenizer.in_channels must be {expected_channels} for the chosen ray input, "
                f"got {config.image_tokenizer.in_channels}"
            )
        self.num_sh = (config.gaussians.sh_degree + 1) ** 2
        self.num_values = 3 + 3 * self.num_sh + 3 + 4 + 1

        self.patch_embedder = nn.Sequential(Patchify(p), nn.Linear(expected_channels * p * p, d, bias=False))
        if config.add_refsrc_marker:
            self.view_type_embeddings = nn.Parameter(torch.empty(2, d))
        self.gaussian_position_embeddings = nn.Parameter(torch.empty(config.gaussians.n_gaussians, d))
        self.input_layer_norm = nn.LayerNorm(d, bias=False)
        self.transformer_layers = nn.ModuleList(
            TransformerBlock(d, config.transformer.d_head) for _ in range(config.transformer.n_layer)
        )
        self.gaussian_upsampler = FreeGaussianHead(d, self.num_values)
        self.pixel_gaussian_decoder = nn.Sequential(
            nn.LayerNorm(d, bias=False), nn.Linear(d, p * p * self.num_values, bias=False)
        )
        self.apply(init_weights)
        for name in ("gaussian_position_embeddings", "view_type_embeddings"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=INIT_STD)

    def forward(
        self, images: Tensor, cameras: Cameras, *, masks: Tensor | None = None, clip_xyz: bool = False
    ) -> GSLRMOutput:
        """Predicts Gaussians from posed views.

        images: [b, v, 3, h, w] RGB in 0..1 (composited); h, w multiples of the patch size. Any v.
        cameras: shape [b, v], OpenCV axes, of pictures h x w.
        masks: [b, v, 1, h, w] foreground in 0..1; needed if and only if `config.prune_background_tokens`: background tokens
            and Gaussians (farther than `prune_margin_px` from the mask) are dropped.
        clip_xyz: image Gaussians into [-1, 1] (training with `config.clip_xyz`; never at inference).
        Raises ValueError when shapes do not go together.
        """
        self._check_inputs(images, cameras, masks)
        b, v, _, h, w = images.shape
        with torch.autocast(images.device.type, enabled=False):  # rays in bf16 would miss their pixels
            origins, directions = (rearrange(x, "b v h w c -> b v c h w") for x in cameras.rays())
            nearest_depth = -(origins * directions).sum(2, keepdim=True)
            posed = self._posed_images(images, origins, directions, origins + nearest_depth * directions)

        selection = select_pixels(masks, self.config.image_tokenizer.patch_size, self.config.prune_margin_px)
        tokens, valid = self._embed(posed, selection)
        tokens = run_blocks(self.transformer_layers, tokens, valid, self.grad_checkpoint_every)

        # Heads in full precision: a depth rounded to bf16 moves a point by up to 5e-2 along its ray.
        with torch.autocast(tokens.device.type, enabled=False):
            n_free = self.config.gaussians.n_gaussians
            free = self.gaussian_upsampler(tokens[:, :n_free].float())
            values = self.pixel_gaussian_decoder(tokens[:, n_free:].float())
            values = rearrange(values, "b n (q c) -> b (n q) c", c=self.num_values)
            if selection is None:
                index = patch_order_index(v, h, w, self.config.image_tokenizer.patch_size, images.device)
                index = index.expand(b, -1)
                pixel_valid = torch.ones_like(index, dtype=torch.bool)
            else:
                values = gather_rows(values, selection.gaussian_slot)
                index, pixel_valid = selection.pixel_index, selection.pixel_valid
            ray_o, ray_d, t0 = (
                gather_rows(rearrange(x, "b v c h w -> b (v h w) c"), index)
                for x in (origins, directions, nearest_depth)
            )
            gaussians = self._decode(free, values, (ray_o, ray_d, t0), pixel_valid, clip_xyz)
        return GSLRMOutput(gaussians, index, pixel_valid, ray_o, ray_d, n_free, (v, h, w))

    def _check_inputs(self, images: Tensor, cameras: Cameras, masks: Tensor | None) -> None:
        p = self.config.image_tokenizer.patch_size
        if images.ndim != 5 or images.shape[2] != 3 or images.shape[3] % p or images.shape[4] % p:
            raise ValueError(f"images must be [b, v, 3, h, w], h and w multiples of {p}, got {list(images.shape)}")
        b, v, _, h, w = images.shape
        if tuple(cameras.shape) != (b, v) or (cameras.height, cameras.width) != (h, w):
            raise ValueError(
                f"cameras must have shape [{b}, {v}] for pictures {h} x {w} to go with images {list(images.shape)}, "
                f"got {list(cameras.shape)} for {cameras.height} x {cameras.width}"
            )
        if (masks is not None) != self.config.prune_background_tokens:
            raise ValueError(
                f"masks are {'given' if masks is not None else 'missing'} but model.prune_background_tokens is "
                f"{self.config.prune_background_tokens}: a model that prunes the background needs masks, another takes none"
            )
        if masks is not None and masks.shape != (b, v, 1, h, w):
            raise ValueError(f"masks must be [{b}, {v}, 1, {h}, {w}], got {list(masks.shape)}")

    def _posed_images(self, images: Tensor, origins: Tensor, directions: Tensor, nearest: Tensor) -> Tensor:
        """[b, v, 9|12, h, w]: colours in -1..1 and rays."""
        rgb = images * 2.0 - 1.0
        if self.config.use_custom_plucker:
            return torch.cat([rgb, directions, nearest], dim=2)
        moment = torch.linalg.cross(origins, directions, dim=2)
        if self.config.use_aug_plucker:
            return torch.cat([rgb, moment, directions, nearest], dim=2)
        return torch.cat([rgb, moment, directions], dim=2)

    def _embed(self, posed: Tensor, selection: PixelSelection | None) -> tuple[Tensor, Tensor | None]:
        """Tokens [b, n_free + n, d] after the input norm, and which are real [b, n_free + n] (None: all)."""
        b, v = posed.shape[:2]
        patchify, linear = self.patch_embedder
        patches = patchify(posed)
        view = torch.arange(v, device=posed.device).repeat_interleave(patches.shape[1] // v).expand(b, -1)
        valid = None
        n_free = self.config.gaussians.n_gaussians
        if selection is not None:
            patches = gather_rows(patches, selection.token_index)
            view = view.gather(1, selection.token_index)
            valid = functional.pad(selection.token_valid, (n_free, 0), value=True)
        tokens = linear(patches)
        if self.config.add_refsrc_marker:
            tokens = tokens + self.view_type_embeddings[view.clamp(max=1)]
        tokens = torch.cat([self.gaussian_position_embeddings.expand(b, -1, -1).to(tokens), tokens], dim=1)
        return self.input_layer_norm(tokens), valid

    def _decode(
        self, free: Tensor, image: Tensor, rays: tuple[Tensor, Tensor, Tensor], valid: Tensor, clip_xyz: bool
    ) -> Gaussians:
        """Head outputs [b, n, D] -> raw Gaussians; free ones first."""
        xyz = image[..., :3]
        if self.config.hard_pixelalign:
            origins, directions, t0 = rays
            sigma = torch.sigmoid(xyz.mean(-1, keepdim=True) + self.config.depth_preact_bias)
            xyz = origins + self._depth(sigma, origins, t0) * directions
            if clip_xyz:
                xyz = xyz.clamp(-1.0, 1.0)
        values = torch.cat([free, torch.cat([xyz, image[..., 3:]], dim=-1)], dim=1)
        xyz, features, scaling, rotation, opacity = values.split([3, 3 * self.num_sh, 3, 4, 1], dim=-1)
        scaling = (scaling + SCALING_OFFSET).clamp(max=SCALING_MAX)
        if self.config.gaussians.scaling_modifier:
            scaling = scaling + math.log(self.config.gaussians.scaling_modifier)
        present = functional.pad(valid, (free.shape[1], 0), value=True)[..., None]
        opacity = torch.where(present, opacity + OPACITY_OFFSET, ABSENT_OPACITY)
        features = rearrange(features, "b n (k c) -> b n k c", c=3)
        return Gaussians(xyz=xyz, features=features, scaling=scaling, rotation=rotation, opacity=opacity)

    def _depth(self, sigma: Tensor, origins: Tensor, nearest_depth: Tensor) -> Tensor:
        """Distance along the ray [b, k, 1] from sigma in 0..1."""
        config = self.config
        if config.use_custom_plucker or config.use_aug_plucker:
            return (2.0 * sigma - 1.0) * DEPTH_HALF_RANGE + nearest_depth
        if config.depth_min > 0 and config.depth_max > 0:
            return sigma * (config.depth_max - config.depth_min) + config.depth_min
        if config.depth_reference_origin:
            return (2.0 * sigma - 1.0) * DEPTH_HALF_RANGE + origins.norm(dim=-1, keepdim=True)
        return (2.0 * sigma - 1.0) * PLAIN_DEPTH_HALF_RANGE + PLAIN_DEPTH_CENTRE


# ---- which pixels and patches take part -----------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelSelection:
    """Foreground patches (t per sample, padded) and the pixels in them that become Gaussians (k per sample, padded)."""

    token_index: Tensor  # [b, t] patch number among all views
    token_valid: Tensor  # [b, t] bool
    gaussian_slot: Tensor  # [b, k] position among the t*p*p pixels of the kept patches
    pixel_index: Tensor  # [b, k] (view*h + row)*w + column
    pixel_valid: Tensor  # [b, k] bool


@torch.no_grad()
def select_pixels(masks: Tensor | None, patch_size: int, margin_px: int) -> PixelSelection | None:
    """Pixels within `margin_px` of the foreground (alpha > 0.1), and the patches that hold any. None for no masks.

    masks: [b, v, 1, h, w].
    """
    if masks is None:
        return None
    b, v, _, h, w = masks.shape
    foreground = functional.max_pool2d((masks > 0.1).float().flatten(0, 1), 2 * margin_px + 1, 1, margin_px) > 0
    pixels = Patchify(patch_size)(foreground.view(b, v, 1, h, w))  # [b, patches, p*p]
    token_index, token_valid = pack_true(pixels.any(-1))
    kept = gather_rows(pixels, token_index) & token_valid[..., None]
    slot, pixel_valid = pack_true(kept.flatten(1))
    order = patch_order_index(v, h, w, patch_size, masks.device).view(1, -1, patch_size**2).expand(b, -1, -1)
    pixel_index = gather_rows(order, token_index).flatten(1).gather(1, slot)
    return PixelSelection(token_index, token_valid, slot, pixel_index, pixel_valid)


def pack_true(flags: Tensor) -> tuple[Tensor, Tensor]:
    """[b, n] bool -> index [b, k] of the True entries in order, and which of the k are real (k = largest count)."""
    count = flags.sum(1)
    k = max(int(count.max()), 1)
    index = torch.argsort((~flags).to(torch.uint8), dim=1, stable=True)[:, :k]
    return index, torch.arange(k, device=flags.device)[None] < count[:, None]


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """values [b, n, c], index [b, k] -> [b, k, c]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def patch_order_index(v: int, h: int, w: int, patch_size: int, device: torch.device) -> Tensor:
    """[1, v*h*w]: the pixel number (view*h + row)*w + column at each place of the patch order."""
    pixels = torch.arange(v * h * w, device=device).view(1, v, 1, h, w)
    return Patchify(patch_size)(pixels).flatten(1)
