"""
The MoSA layer step by step as its authors' published code computes it (`PureMoSA` of github.com/piotrpiekos/MoSA): the
rival that our heads are timed against.

Tokens stay in the order in which `topk` returns them, so that every head needs a mask of its own.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mosa_hf.kernels.tensors import HeadWeights, rotate


class PaperLayer(nn.Module):
    """
    Expert choice and one query head a group, without biases. Computes the same function as `MosaHeads` with these
    weights while that trains with `mosa_include_first=False`, from parameters of its own in the published layout.

    Args:
        weights: of the projections, copied.
        router: `[G, D]`, copied.
        sparsity: ρ.
        min_tokens: least K.

    Raises:
        ValueError: for heads that the published code does not have.
    """

    def __init__(self, weights: HeadWeights, router: torch.Tensor, sparsity: float, min_tokens: int = 2):
        super().__init__()
        if weights.query.shape != weights.key.shape or weights.query_bias is not None:
            raise ValueError("The published layer has one query head a group and no biases.")
        self.sparsity, self.min_tokens = sparsity, min_tokens
        self.router = nn.Parameter(router.detach().clone())  # [G, D]
        joint = torch.cat((weights.query, weights.key, weights.value), dim=1).detach()
        self.input = nn.Parameter(joint.transpose(1, 2).contiguous())  # [G, D, 3 * d]
        self.output = nn.Parameter(weights.output.detach().transpose(1, 2).contiguous())  # [G, d, D]

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, D]`.
            cos, sin: `[B, T, rotary_dim]`.

        Returns:
            `[B, T, D]`: the heads' outputs after W_O, summed.
        """
        batch_size, num_tokens, hidden_size = hidden_states.shape
        num_selected = min(max(int(num_tokens // self.sparsity), self.min_tokens), num_tokens)
        best = F.linear(hidden_states, self.router).sigmoid().topk(num_selected, dim=1)
        gate, index = best.values.transpose(1, 2), best.indices.transpose(1, 2)  # [B, G, K]

        tokens = index.flatten(1)[..., None].expand(-1, -1, hidden_size)
        rows = hidden_states.gather(1, tokens).unflatten(1, index.shape[1:])  # [B, G, K, D]
        query, key, value = torch.einsum("bgkn,gnd->bgkd", rows, self.input).chunk(3, dim=-1)
        query, key = (self._rotate_slots(states, index, cos, sin) for states in (query, key))
        mask = index[..., :, None] >= index[..., None, :]  # [B, G, K, K]
        # One head a group, as a dimension of its own.
        heads = F.scaled_dot_product_attention(
            query[:, :, None], key[:, :, None], value[:, :, None], attn_mask=mask[:, :, None]
        )
        heads = heads[:, :, 0] * gate[..., None]

        update = torch.einsum("bgkd,gdn->bgkn", heads, self.output).flatten(1, 2)  # [B, G * K, D]
        return torch.zeros_like(hidden_states).scatter_add_(1, tokens, update)

    @staticmethod
    def _rotate_slots(
        states: torch.Tensor, index: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Rotary embedding of `states` [B, G, K, d] at the positions `index` [B, G, K]."""
        place = index[..., None].expand(-1, -1, -1, cos.shape[-1])
        cos, sin = (
            angle[:, None].expand(-1, index.shape[1], -1, -1).gather(2, place) for angle in (cos, sin)
        )
        return rotate(states, cos, sin)
