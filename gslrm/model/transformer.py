"""The transformer of GS-LRM: pre-norm blocks without a single bias, full attention over all tokens of all views.

Tokens are packed: linear layers and norms run over the rows of all samples, attention over each sample's own rows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


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
        equal = len(set(lengths)) == 1
        attended = []
        for batch in [qkv.unflatten(0, (len(lengths), lengths[0]))] if equal else [x[None] for x in qkv.split(lengths)]:
            query, key, value = batch.permute(2, 0, 3, 1, 4)  # each [b, heads, n, d_head]
            values = functional.scaled_dot_product_attention(query, key, value)
            attended.append(values.transpose(1, 2).flatten(2).flatten(0, 1))
        return run_linear(self.fc, attended[0] if equal else torch.cat(attended))


def run_linear(layers: nn.Linear | nn.Sequential, tokens: Tensor) -> Tensor:
    """`layers(tokens)`, tokens [T, d].

    Inference in float32 on a CPU goes through oneDNN's layout: the same products, rounded differently, at up to twice
    the speed of the default library. Only for torch's own layers: an adapter around one runs as it is.
    """
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

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), lengths)
        return tokens + run_linear(self.mlp["mlp"], self.norm2(tokens))


def run_blocks(blocks: nn.ModuleList, tokens: Tensor, lengths: list[int], checkpoint_every: int) -> Tensor:
    """Runs the blocks on packed tokens [T, d] whose samples have `lengths` tokens (sum T).

    With `checkpoint_every` k > 0, groups of k blocks are recomputed in the backward pass.
    """

    def run_group(start: int, tokens: Tensor) -> Tensor:
        for block in blocks[start : start + step]:
            tokens = block(tokens, lengths)
        return tokens

    # Without it one by one: a longer group's caller would hold on to the group's input.
    checkpointing = checkpoint_every > 0 and torch.is_grad_enabled()
    step = checkpoint_every if checkpointing else 1
    run = partial(checkpoint, run_group, use_reentrant=False) if checkpointing else run_group
    for start in range(0, len(blocks), step):
        tokens = run(start, tokens)
    return tokens
