"""Camera poses as inputs of the UNet: prompts can only name a view, numbers say where its camera stands.

Three ways, each exactly without effect until trained (zero-initialized output, added to what pretrained layers give):

- `adaln`: an embedding [b * n, time width] added to the time step's.
- `cross_attention`: TOKENS camera tokens beside the prompt's, with a softmax of their own (in the prompt's even a zero
  token changes it), as image prompts in IP-Adapter (https://arxiv.org/abs/2308.06721), through the layer's own key and
  value projections: these have no bias, so zero tokens add exactly nothing.
- `concat`: Pluecker-ray channels beside the latents: conv_in keeps its weights, a second, zero convolution is added.

All is relative to the reference view's azimuth: turning the world about its z axis changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from multiview.cameras import Cameras
from multiview.rig import FACELIFT_DISTANCE, FACELIFT_FOCAL
from multiview.run import make_generator

CAMERA_MODES = ("none", "adaln", "cross_attention", "concat")
# Of the Fourier series in the azimuth, each at 1 / order: low ones, because a rig has few azimuths, 45 to 90 degrees
# apart, and what is learned there shall carry over to the directions between them.
ORDERS = (1, 2)
FEATURES = 2 * len(ORDERS) + 2 * 8  # sines and cosines, own pose, the reference's pose
RAY_CHANNELS = 6
TOKENS = 4


def is_camera_weight(name: str) -> bool:
    """Says whether camera conditioning added a state-dict name to a stock UNet's."""
    return "camera" in name.split(".")


def camera_features(cameras: Cameras, reference_view: int) -> Tensor:
    """Cameras [..., n] -> [..., n, FEATURES]: azimuth relative to the reference view, own pose, the reference's
    pose."""
    # The pose, zero for FaceLift's own front camera and of order 1 elsewhere: elevation in radians; log distance and
    # log focal length over FaceLift's; direction of the world origin from the camera (x, y of the unit vector);
    # principal point off the center over the image size; tilt (world z of the camera's x axis).
    azimuth = torch.deg2rad(cameras.azimuth_deg)
    orders = azimuth.new_tensor(ORDERS)
    multiples = (azimuth - azimuth[..., reference_view, None])[..., None] * orders
    rotation, size = cameras.c2w[..., :3, :3], cameras.fxfycxcy.new_tensor([cameras.width, cameras.height])
    distance = cameras.distance[..., None]
    towards_origin = torch.einsum("...ij,...i->...j", rotation, -cameras.origins / distance)
    elevation, focal = torch.deg2rad(cameras.elevation_deg)[..., None], cameras.fxfycxcy[..., :1] / cameras.width
    lengths = [(distance / FACELIFT_DISTANCE).log(), (focal / FACELIFT_FOCAL).log()]
    off_center, tilt = cameras.fxfycxcy[..., 2:] / size - 0.5, rotation[..., 2, :1]
    pose = torch.cat([elevation, *lengths, towards_origin[..., :2], off_center, tilt], dim=-1)
    reference = pose[..., reference_view, None, :].expand_as(pose)
    return torch.cat([multiples.sin() / orders, multiples.cos() / orders, pose, reference], dim=-1)


def camera_rays(cameras: Cameras, reference_view: int, side: int) -> Tensor:
    """Cameras [..., n] -> Pluecker rays [..., n, 6, side, side]: direction, then origin x direction in FaceLift's
    distances, in the world turned about z so that the reference view stands at azimuth 0."""
    angle = torch.deg2rad(cameras.azimuth_deg[..., reference_view])
    turn = torch.eye(4, dtype=angle.dtype, device=angle.device).repeat(*angle.shape, 1, 1)
    # Azimuth runs clockwise seen from above, so taking it away turns counter-clockwise.
    turn[..., 0, 0], turn[..., 0, 1] = angle.cos(), -angle.sin()
    turn[..., 1, 0], turn[..., 1, 1] = angle.sin(), angle.cos()
    turned = replace(cameras, c2w=turn[..., None, :, :] @ cameras.c2w)
    origins, directions = turned.resize(side, side).rays()
    moments = torch.linalg.cross(origins, directions, dim=-1) / FACELIFT_DISTANCE
    return torch.cat([directions, moments], dim=-1).movedim(-1, -3)


def camera_inputs(mode: str, cameras: Cameras, reference_view: int, side: int, batch: int) -> dict[str, Tensor]:
    """Cameras [b, n] -> what a UNet of this mode reads, repeated for a batch of k * b * n (guidance halves)."""
    count = cameras.shape.numel()
    if batch % count:
        raise ValueError(f"the batch must be a multiple of the cameras' objects x views = {count}, got {batch}")
    if mode == "concat":
        inputs = {"camera_rays": camera_rays(cameras, reference_view, side)}
    else:
        inputs = {"camera_features": camera_features(cameras, reference_view)}
    return {name: torch.cat([values.flatten(0, 1)] * (batch // count)) for name, values in inputs.items()}


class CameraEmbedding(nn.Module):
    """Camera features [b, FEATURES] -> zero-initialized projection of an embedding: [b, outputs] for the time embedding
    (`adaln`), [b, TOKENS, outputs] for the prompt's tokens (`cross_attention`)."""

    def __init__(self, mode: str, width: int, outputs: int) -> None:
        super().__init__()
        # One projection for all tokens, each of its own part of the embedding: equal zero tokens would stay equal.
        self.tokens = TOKENS if mode == "cross_attention" else 1
        if width % self.tokens:
            raise ValueError(f"the time embedding's width must be a multiple of {TOKENS}, got {width}")
        self.mlp = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.output = nn.Linear(width // self.tokens, outputs)
        generator = make_generator("camera conditioning")  # its own: the same on every process and in every run
        # Few features differ between the views of a rig, so the usual 1 / sqrt(inputs) would make all views alike.
        nn.init.normal_(self.mlp[0].weight, generator=generator)
        nn.init.kaiming_normal_(self.mlp[2].weight, generator=generator)
        for zero in (self.mlp[0].bias, self.mlp[2].bias, self.output.weight, self.output.bias):
            nn.init.zeros_(zero)

    def forward(self, features: Tensor) -> Tensor:
        embedding = self.mlp(features.to(self.mlp[0].weight.dtype))
        return self.output(embedding if self.tokens == 1 else embedding.unflatten(-1, (self.tokens, -1)))


class CameraConv2d(nn.Conv2d):
    """A convolution that takes RAY_CHANNELS more channels; their weights, zero at first, are `camera.weight`."""

    @staticmethod
    def widen(conv: nn.Conv2d) -> CameraConv2d:
        """`conv` with its own weights and zero ones for the rays."""
        options = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
        wide = CameraConv2d(conv.in_channels, conv.out_channels, **options)
        wide.weight, wide.bias = conv.weight, conv.bias
        wide.camera = nn.Conv2d(RAY_CHANNELS, conv.out_channels, bias=False, **options)
        nn.init.zeros_(wide.camera.weight)
        return wide

    def forward(self, x: Tensor) -> Tensor:
        """[b, in_channels + RAY_CHANNELS, h, w] -> [b, out_channels, h', w']."""
        return super().forward(x[:, : self.in_channels].contiguous()) + self.camera(x[:, self.in_channels :])


class CameraAttnProcessor:
    """Cross-attention to the prompt's tokens plus cross-attention to the TOKENS camera tokens appended to them."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> Tensor:
        """hidden_states: [b, tokens, channels]; encoder_hidden_states: [b, prompt tokens + TOKENS, width]."""
        if attention_mask is not None:
            raise ValueError("camera tokens need cross-attention without a mask; got a mask")

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, mixed = heads(attn.to_q(hidden_states)), 0.0
        for source in (encoder_hidden_states[:, :-TOKENS], encoder_hidden_states[:, -TOKENS:]):
            source = source.contiguous()  # each projected as if alone: bit by bit what the stock layer computes
            mixed = F.scaled_dot_product_attention(query, heads(attn.to_k(source)), heads(attn.to_v(source))) + mixed
        mixed = mixed.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor
