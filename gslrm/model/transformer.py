"""The transformer of GS-LRM: pre-norm blocks without a single bias, full attention over all tokens of all views."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02


class Attention(nn.Module):
    """Multi-head self-attention; one matrix makes q, k, v in that order, the head index runs slow."""

    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        if d % d_head:
            raise ValueError(f"model.transformer: d must be a multiple of d_head, got d {d}, d_head {d_head}")
        self.d_head = d_head
        self.to_qkv = nn.Linear(d, 3 * d, bias=False)
        self.fc = nn.Linear(d, d, bias=False)

    def forward(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """tokens: [b, n, d]; valid: [b, n] bool, False = padding that nobody attends to, or None."""
        b, n, d = tokens.shape
        qkv = self.to_qkv(tokens).view(b, n, 3, d // self.d_head, self.d_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, n, d_head]
        mask = None if valid is None else valid[:, None, None, :]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.fc(attended.transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(tokens)


class TransformerBlock(nn.Module):
    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, bias=False)
        self.attn = Attention(d, d_head)
        self.norm2 = nn.LayerNorm(d, bias=False)
        self.mlp = MLP(d)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), valid)
        return tokens + self.mlp(self.norm2(tokens))


def run_blocks(blocks: nn.ModuleList, tokens: Tensor, valid: Tensor | None, checkpoint_every: int) -> Tensor:
    """Runs the blocks; with `checkpoint_every` k > 0, groups of k blocks are recomputed in the backward pass."""
    if checkpoint_every <= 0 or not torch.is_grad_enabled():
        for block in blocks:
            tokens = block(tokens, valid)
        return tokens

    def run_group(start: int, tokens: Tensor) -> Tensor:
        for block in blocks[start : start + checkpoint_every]:
            tokens = block(tokens, valid)
        return tokens

    for start in range(0, len(blocks), checkpoint_every):
        tokens = checkpoint(run_group, start, tokens, use_reentrant=False)
    return tokens


def init_weights(module: nn.Module) -> None:
    """Linear layers N(0, 0.02), norms 1 (apply with `model.apply`)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
