"""GS-LRM of one scene in float64, pixel by pixel where it is clearer: the formulas alone, slow, sharing no code.

Written from docs/conventions.md and the facts measured of FaceLift's network (its goldens check the same formulas).
"""

import math

import torch
from torch.nn import functional


def rays(c2w, fxfycxcy, h, w):
    """[h, w, 3] origins and unit directions of one camera."""
    fx, fy, cx, cy = fxfycxcy
    v, u = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    camera = torch.stack([(u + 0.5 - cx) / fx, (v + 0.5 - cy) / fy, torch.ones(h, w).double()], -1)
    world = camera @ c2w[:3, :3].T
    return c2w[:3, 3].expand(h, w, 3), world / world.norm(dim=-1, keepdim=True)


def channels(config, image, origin, direction):
    """[h, w, c] what the patches are cut from; image [3, h, w] in 0..1."""
    rgb = image.permute(1, 2, 0) * 2 - 1
    moment = torch.linalg.cross(origin, direction, dim=-1)
    nearest = origin - (origin * direction).sum(-1, keepdim=True) * direction
    if config.use_custom_plucker:
        return torch.cat([rgb, direction, nearest], -1)
    if config.use_aug_plucker:
        return torch.cat([rgb, moment, direction, nearest], -1)
    return torch.cat([rgb, moment, direction], -1)


def norm(x, weight):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def block(x, weights, prefix, d_head):
    n, d = x.shape
    q, k, v = (norm(x, weights[f"{prefix}.norm1.weight"]) @ weights[f"{prefix}.attn.to_qkv.weight"].T).split(d, -1)
    heads = []
    for start in range(0, d, d_head):
        one = slice(start, start + d_head)
        heads.append((q[:, one] @ k[:, one].T / math.sqrt(d_head)).softmax(-1) @ v[:, one])
    x = x + torch.cat(heads, -1) @ weights[f"{prefix}.attn.fc.weight"].T
    hidden = functional.gelu(norm(x, weights[f"{prefix}.norm2.weight"]) @ weights[f"{prefix}.mlp.mlp.0.weight"].T)
    return x + hidden @ weights[f"{prefix}.mlp.mlp.2.weight"].T


def depth(config, sigma, origin, direction):
    """Where on its ray a point lies, from sigma in 0..1."""
    if config.use_custom_plucker or config.use_aug_plucker:
        return (2 * sigma - 1) * 1.8 - origin @ direction
    if config.depth_min > 0 and config.depth_max > 0:
        return sigma * (config.depth_max - config.depth_min) + config.depth_min
    if config.depth_reference_origin:
        return (2 * sigma - 1) * 1.8 + origin.norm()
    return (2 * sigma - 1) * 1.5 + 2.7


def gaussians(model, images, cameras, *, kept=None, clip_xyz=False):
    """Raw values [n, D'] of one scene, D' = xyz, SH (coefficient slow, rgb fast), log-scale, rotation, opacity logit.

    images [v, 3, h, w]; cameras of shape [v]; kept: pixels [v, h, w] bool that become Gaussians, patches without any
    are no tokens (None: all).
    """
    config, weights = model.config, {name: value.double() for name, value in model.state_dict().items()}
    p, d_head = config.image_tokenizer.patch_size, config.transformer.d_head
    v, _, h, w = images.shape
    kept = torch.ones(v, h, w, dtype=torch.bool) if kept is None else kept
    posed_rays = [rays(cameras.c2w[i].double(), cameras.fxfycxcy[i].double(), h, w) for i in range(v)]
    places = [(i, y, x) for i in range(v) for y in range(0, h, p) for x in range(0, w, p)]
    places = [(i, y, x) for i, y, x in places if kept[i, y : y + p, x : x + p].any()]
    tokens = [row for row in weights["gaussian_position_embeddings"]]
    for i, y, x in places:
        patch = channels(config, images[i].double(), *posed_rays[i])[y : y + p, x : x + p].reshape(-1)
        token = weights["patch_embedder.1.weight"] @ patch
        if config.add_refsrc_marker:
            token = token + weights["view_type_embeddings"][0 if i == 0 else 1]
        tokens.append(token)
    x = norm(torch.stack(tokens), weights["input_layer_norm.weight"])
    for layer in range(config.transformer.n_layer):
        x = block(x, weights, f"transformer_layers.{layer}", d_head)

    free = config.gaussians.n_gaussians
    first = norm(x[:free], weights["gaussian_upsampler.layernorm.weight"])
    rows = [finish(config, row) for row in first @ weights["gaussian_upsampler.linear.weight"].T]
    values = norm(x[free:], weights["pixel_gaussian_decoder.0.weight"]) @ weights["pixel_gaussian_decoder.1.weight"].T
    for (i, top, left), patch in zip(places, values.unflatten(1, (p, p, -1))):
        for a in range(p):
            for b in range(p):
                if kept[i, top + a, left + b]:
                    row = finish(config, patch[a, b])
                    if config.hard_pixelalign:
                        origin, direction = (ray[top + a, left + b] for ray in posed_rays[i])
                        sigma = 1 / (1 + torch.exp(-(patch[a, b, :3].mean() + config.depth_preact_bias)))
                        row[:3] = origin + depth(config, sigma, origin, direction) * direction
                        row[:3] = row[:3].clamp(-1, 1) if clip_xyz else row[:3]
                    rows.append(row)
    return torch.stack(rows)


def finish(config, row):
    row = row.clone()
    row[-8:-5] = torch.minimum(row[-8:-5] - 2.3, torch.tensor(-1.20).double())
    if config.gaussians.scaling_modifier:
        row[-8:-5] += math.log(config.gaussians.scaling_modifier)
    row[-1] -= 2.0
    return row
