"""The stock UNet with camera conditioning: three of its own hooks overridden, nothing copied.

Apart from unet.py because the class needs diffusers at import; unet.py imports it where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mvdiffusion.models.camera_conditioning import CAMERA_MODES, CameraConv2d, CameraEmbedding


class CameraUNet(UNet2DConditionModel):
    """UNet2DConditionModel whose `added_cond_kwargs` carry cameras (`camera_conditioning.camera_inputs`)."""

    def add_camera_conditioning(self, mode: str) -> CameraUNet:
        """Adds the mode's layers, without effect until trained, and records it in the config. Returns itself."""
        if mode not in CAMERA_MODES[1:]:
            raise ValueError(f"camera_conditioning must be one of {', '.join(CAMERA_MODES)}, got {mode!r}")
        for key in ("addition_embed_type", "encoder_hid_dim_type", "cross_attention_norm"):
            if self.config[key] is not None:
                raise ValueError(f"camera conditioning needs a UNet with {key} null, got {self.config[key]!r}")
        width = self.time_embedding.linear_2.out_features
        if mode == "adaln":
            self.camera = CameraEmbedding(mode, width, width)
        elif mode == "cross_attention":
            self.camera = CameraEmbedding(mode, width, self.config.cross_attention_dim)
        else:
            self.conv_in = CameraConv2d.widen(self.conv_in)
        self.register_to_config(camera_conditioning=mode)
        return self

    def forward(self, sample: Tensor, *args: Any, added_cond_kwargs: dict[str, Tensor], **kwargs: Any) -> Any:
        if self.config.camera_conditioning == "concat":
            sample = torch.cat([sample, added_cond_kwargs["camera_rays"].to(sample.dtype)], dim=1)
        return super().forward(sample, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    def get_aug_embed(
        self, emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> Tensor | None:
        """What the stock forward adds to the time embedding: for `adaln`, the cameras'."""
        if self.config.camera_conditioning != "adaln":
            return None
        return self.camera(added_cond_kwargs["camera_features"]).to(emb.dtype)

    def process_encoder_hidden_states(
        self, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> Tensor:
        """What the stock forward gives to cross-attention: for `cross_attention`, with the camera tokens appended."""
        if self.config.camera_conditioning != "cross_attention":
            return encoder_hidden_states
        tokens = self.camera(added_cond_kwargs["camera_features"]).to(encoder_hidden_states.dtype)
        return torch.cat([encoder_hidden_states, tokens], dim=1)
