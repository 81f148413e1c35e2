"""Attention over several views of one object, as an attention processor of the stock diffusers UNet: exact, whatever
backend is installed. Self-attention is `sparse`: a view attends to the reference view and to itself (what FaceLift's
released weights run); `full`: to all views of its object; `none`: to itself. Batches are (object, view).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of [..., tokens, d]. Training in bfloat16 on a CPU goes without torch's fused kernel, whose
    backward pass is two to five times slower there than these three products."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class MultiViewAttnProcessor:
    """num_views: views per object. mode: `sparse`, `full` or `none`. reference_view: what every view sees if sparse."""

    def __init__(self, num_views: int, mode: str) -> None:
        self.mode, self.num_views, self.reference_view = mode, num_views, 0

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:  # fmt: skip
        """hidden_states: [objects * views, tokens, channels] -> the same shape. encoder_hidden_states: the prompts
        [objects * views, tokens, width], with mode `none` only."""
        if attention_mask is not None or (encoder_hidden_states is not None and self.mode != "none"):
            raise ValueError("multi-view attention is self-attention without a mask; got cross-attention or a mask")
        batch, tokens, _ = hidden_states.shape
        if batch % self.num_views and self.mode != "none":
            raise ValueError(f"the batch must be a multiple of num_views={self.num_views}, got {batch}")
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        query, key, value = (layer(x).unflatten(-1, (attn.heads, -1)) for layer, x in inputs)
        if self.mode == "full":
            # One long sequence per object: the view axis moves into the token axis, nothing is copied.
            query, key, value = (x.reshape(batch // self.num_views, -1, *x.shape[2:]) for x in (query, key, value))
        elif self.mode == "sparse":
            # The reference view's tokens first. The copy costs 2 to 6 % of the layer's time at SD's sizes (CPU); doing
            # without would take two softmaxes and their log-sum-exp, which torch's attention does not return.
            per_view = [x.unflatten(0, (-1, self.num_views)) for x in (key, value)]
            shown = [x[:, self.reference_view, None].expand_as(x) for x in per_view]
            key, value = (torch.cat(pair, dim=2).flatten(0, 1) for pair in zip(shown, per_view))
        mixed = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1)
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor
