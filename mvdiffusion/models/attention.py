"""Self-attention over several views of one object, as an attention processor of the stock diffusers UNet.

One explicit mode, computed exactly by torch's scaled_dot_product_attention whatever backend is installed:

- `sparse`: a view attends to the reference view and to itself (what FaceLift's released weights run);
- `full`: a view attends to all views of its object;
- `none`: every view for itself (a stock 2D UNet).

The batch is (object, view) with the view running fastest. Cross-attention (attn2) stays stock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from mvdiffusion.models.camera_conditioning import CameraAttnProcessor

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

ATTENTION_MODES = ("sparse", "full", "none")


class MultiViewAttnProcessor:
    """Self-attention processor for a batch of views.

    num_views: views per object; the batch must be a multiple of it.
    mode: `sparse` or `full`.
    reference_view: index of the view that every view sees in `sparse` mode.
    """

    def __init__(self, num_views: int, mode: str, reference_view: int = 0) -> None:
        if mode not in ("sparse", "full"):
            raise ValueError(f"multi-view attention mode must be sparse or full, got {mode!r}")
        self.mode, self.num_views, self.reference_view = mode, num_views, reference_view

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: [objects * views, tokens, channels] -> the same shape."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("multi-view attention is self-attention without a mask; got cross-attention or a mask")
        batch, tokens, channels = hidden_states.shape
        if batch % self.num_views:
            raise ValueError(f"the batch must be a multiple of num_views={self.num_views}, got {batch}")
        objects = batch // self.num_views

        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if self.mode == "full":
            # One long sequence per object: the view axis moves into the token axis, nothing is copied.
            query, key, value = (x.reshape(objects, -1, *x.shape[2:]) for x in (query, key, value))
        else:
            key, value = (self._with_reference(x) for x in (key, value))
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1)
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor

    def _with_reference(self, x: Tensor) -> Tensor:
        """[objects * views, tokens, ...] -> [objects * views, 2 * tokens, ...]: the reference view's tokens first.

        One more copy of the reference's keys (and values) per view: at SD's sizes 2 to 6 % of the layer's time (CPU).
        Doing without would take two softmaxes and their log-sum-exp, which torch's attention does not return.
        """
        per_view = x.unflatten(0, (-1, self.num_views))
        reference = per_view[:, self.reference_view, None].expand_as(per_view)
        return torch.cat([reference, per_view], dim=2).flatten(0, 1)


def set_multiview_attention(unet: UNet2DConditionModel, num_views: int, mode: str) -> None:
    """Puts multi-view attention into every self-attention layer (attn1) of `unet`, or takes it out (`none`).

    Cross-attention (attn2) is the stock one, except in a UNet with camera tokens.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    if mode not in ATTENTION_MODES:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_MODES)}, got {mode!r}")
    stock = AttnProcessor2_0()
    self_attention = stock if mode == "none" else MultiViewAttnProcessor(num_views, mode)
    cross = CameraAttnProcessor() if unet.config.camera_conditioning == "cross_attention" else stock
    names = unet.attn_processors
    unet.set_attn_processor({name: self_attention if ".attn1." in name else cross for name in names})


def set_views(unet: Module, num_views: int, reference_view: int) -> None:
    """Tells the multi-view attention of `unet` (wrapped or not) how many views an object has and which is the input."""
    if not 0 <= reference_view < num_views:
        raise ValueError(f"reference_view must be 0..{num_views - 1}, got {reference_view}")
    for module in unet.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, MultiViewAttnProcessor):
            processor.num_views, processor.reference_view = num_views, reference_view
