"""The transformer of GS-LRM: pre-norm blocks without a single bias, full attention over all tokens of all views.

Tokens are packed: linear layers and norms run over the rows of all samples, attention over each sample's own rows.
"""

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

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """tokens: [T, d], the sequences of all samples one after the other; lengths: of each. Samples do not mix."""
        qkv = run_linear(self.to_qkv, tokens).unflatten(-1, (3, -1, self.d_head))  # [T, 3, heads, d_head]
        if len(set(lengths)) == 1:
            attended = attend(qkv.unflatten(0, (len(lengths), lengths[0])))
        else:
            attended = torch.cat([attend(sequence[None]) for sequence in qkv.split(lengths)])
        return run_linear(self.fc, attended)


def attend(qkv: Tensor) -> Tensor:
    """Full attention inside each of b sequences: [b, n, 3, heads, d_head] -> [b * n, heads * d_head]."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, n, d_head]
    attended = functional.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


class MLP(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return run_linear(self.mlp, tokens)


def run_linear(layers: nn.Linear | nn.Sequential, tokens: Tensor) -> Tensor:
    """`layers(tokens)`, tokens [T, d].

    Inference in float32 on a CPU goes through oneDNN's layout: the same products, rounded differently, at up to twice
    the speed of the default library. Only for torch's own layers: an adapter around one runs as it is.
    """
    parts = layers if isinstance(layers, nn.Sequential) else (layers,)
    if (
        tokens.device.type == "cpu"
        and tokens.dtype == torch.float32
        and len(tokens) > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and all(type(part) in (nn.Linear, nn.GELU) for part in parts)
    ):
        return layers(tokens.to_mkldnn()).to_dense()
    return layers(tokens)


class TransformerBlock(nn.Module):
    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, bias=False)
        self.attn = Attention(d, d_head)
        self.norm2 = nn.LayerNorm(d, bias=False)
        self.mlp = MLP(d)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), lengths)
        return tokens + self.mlp(self.norm2(tokens))


def run_blocks(blocks: nn.ModuleList, tokens: Tensor, lengths: list[int], checkpoint_every: int) -> Tensor:
    """Runs the blocks on packed tokens [T, d] whose samples have `lengths` tokens (sum T).

    With `checkpoint_every` k > 0, groups of k blocks are recomputed in the backward pass.
    """
    if checkpoint_every <= 0 or not torch.is_grad_enabled():
        for block in blocks:
            tokens = block(tokens, lengths)
        return tokens

    def run_group(start: int, tokens: Tensor) -> Tensor:
        for block in blocks[start : start + checkpoint_every]:
            tokens = block(tokens, lengths)
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
