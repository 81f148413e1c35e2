"""The network of GS-LRM written with plain torch modules, to compare with: same shapes, same arithmetic, no care taken.

Parameters can be copied from a `GSLRM` (custom Pluecker input, hard pixel alignment, no markers, no pruning), and then
the Gaussians agree.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from gslrm.config import ModelConfig
from gslrm.model.gaussians import Gaussians
from gslrm.model.gslrm import GSLRM
from multiview.cameras import Cameras


class PlainBlock(nn.Module):
    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, bias=False)
        self.attention = nn.MultiheadAttention(d, d // d_head, bias=False, batch_first=True)
        self.norm2 = nn.LayerNorm(d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


class PlainGSLRM(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        plain = config.use_custom_plucker and config.hard_pixelalign and not config.add_refsrc_marker
        if not plain or config.prune_background_tokens or config.gaussians.sh_degree != 0:
            raise ValueError(
                "the plain peer has custom Pluecker input, hard pixel alignment, SH degree 0, no markers and no "
                f"pruning, got {config}"
            )
        d, self.patch = config.transformer.d, config.image_tokenizer.patch_size
        self.embed = nn.Linear(9 * self.patch**2, d, bias=False)
        self.free = nn.Parameter(torch.randn(1, config.gaussians.n_gaussians, d) * 0.02)
        self.norm = nn.LayerNorm(d, bias=False)
        self.blocks = nn.Sequential(
            *(PlainBlock(d, config.transformer.d_head) for _ in range(config.transformer.n_layer))
        )
        self.free_head = nn.Sequential(nn.LayerNorm(d, bias=False), nn.Linear(d, 14, bias=False))
        self.pixel_head = nn.Sequential(nn.LayerNorm(d, bias=False), nn.Linear(d, 14 * self.patch**2, bias=False))

    def forward(self, images: Tensor, cameras: Cameras) -> Gaussians:
        """images: [b, v, 3, h, w] 0..1; cameras: [b, v]. Free Gaussians first, then pixels in patch order."""
        p, num_free = self.patch, self.free.shape[1]
        origins, directions = (rearrange(x, "b v h w c -> b v c h w") for x in cameras.rays())
        nearest_depth = -(origins * directions).sum(2, keepdim=True)
        posed = torch.cat([images * 2 - 1, directions, origins + nearest_depth * directions], dim=2)
        tokens = self.embed(rearrange(posed, "b v c (y p) (x q) -> b (v y x) (p q c)", p=p, q=p))
        tokens = self.blocks(self.norm(torch.cat([self.free.expand(len(tokens), -1, -1), tokens], dim=1)))
        free = self.free_head(tokens[:, :num_free])
        pixels = rearrange(self.pixel_head(tokens[:, num_free:]), "b n (k c) -> b (n k) c", c=14)
        origins, directions, nearest_depth = (
            rearrange(x, "b v c (y p) (x q) -> b (v y x p q) c", p=p, q=p) for x in (origins, directions, nearest_depth)
        )
        depth = (2 * pixels[..., :3].mean(-1, keepdim=True).sigmoid() - 1) * 1.8 + nearest_depth
        values = torch.cat([free, torch.cat([origins + depth * directions, pixels[..., 3:]], dim=-1)], dim=1)
        xyz, features, scaling, rotation, opacity = values.split([3, 3, 3, 4, 1], dim=-1)
        return Gaussians(xyz, features[:, :, None], (scaling - 2.3).clamp(max=-1.2), rotation, opacity - 2.0)

    @torch.no_grad()
    def copy_from(self, model: GSLRM) -> None:
        """Takes the parameters of the project's network."""
        pairs = [
            (self.embed.weight, model.patch_embedder[1].weight),
            (self.free, model.gaussian_position_embeddings[None]),
            (self.norm.weight, model.input_layer_norm.weight),
            (self.free_head[0].weight, model.gaussian_upsampler.layernorm.weight),
            (self.free_head[1].weight, model.gaussian_upsampler.linear.weight),
            (self.pixel_head[0].weight, model.pixel_gaussian_decoder[0].weight),
            (self.pixel_head[1].weight, model.pixel_gaussian_decoder[1].weight),
        ]
        for mine, theirs in zip(self.blocks, model.transformer_layers):
            pairs += [
                (mine.norm1.weight, theirs.norm1.weight), (mine.norm2.weight, theirs.norm2.weight),
                (mine.attention.in_proj_weight, theirs.attn.to_qkv.weight),
                (mine.attention.out_proj.weight, theirs.attn.fc.weight),
                (mine.mlp[0].weight, theirs.mlp.mlp[0].weight), (mine.mlp[2].weight, theirs.mlp.mlp[2].weight),
            ]  # fmt: skip
        for own, source in pairs:
            own.copy_(source)
