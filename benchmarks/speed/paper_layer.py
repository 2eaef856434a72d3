"""
The MoSA layer step by step as its authors' published code computes it (`PureMoSA` of github.com/piotrpiekos/MoSA): the
baseline that our heads are timed against.

Tokens stay in the order in which `topk` returns them, so that every head needs a mask of its own.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mosa_hf.kernels.rotary import rotate
from mosa_hf.modeling.heads import MosaHeads
from mosa_hf.routing.selection import num_selected


class PaperLayer(nn.Module):
    """
    Expert choice and one query head a group, without biases: the function of `heads` while these train, computed from
    copies of their weights in the published layout.

    Raises:
        ValueError: for heads that the published code does not have.
    """

    def __init__(self, heads: MosaHeads):
        super().__init__()
        router = heads.router
        if heads.q_proj.shape != heads.k_proj.shape or heads.q_bias is not None or router.bias is not None:
            raise ValueError("The published layer has one query head a group and no biases.")
        if router.include_first or router.training_routing != "expert_choice":
            raise ValueError("The baseline selects by expert choice alone: `mosa_include_first` has to be False.")
        self.sparsity, self.min_tokens = router.sparsity[0], router.min_tokens
        self.router = nn.Parameter(router.weight.detach().clone())  # [G, D]
        self.input, self.output = (
            nn.Parameter(weight.detach())
            for weight in published_layout(heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj)
        )

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, D]`.
            cos, sin: `[B, T, rotary_dim]`.

        Returns:
            `[B, T, D]`: the heads' outputs after W_O, summed.
        """
        batch_size, num_tokens, hidden_size = hidden_states.shape
        most = num_selected(num_tokens, self.sparsity, self.min_tokens)
        best = F.linear(hidden_states, self.router).sigmoid().topk(most, dim=1)
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
        place = index[..., None].expand(-1, -1, -1, hidden_size).flatten(1, 2)
        return torch.zeros_like(hidden_states).scatter_add_(1, place, update)

    @staticmethod
    def _rotate_slots(states: torch.Tensor, index: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of `states` [B, G, K, d] at the positions `index` [B, G, K]."""
        place = index[..., None].expand(-1, -1, -1, cos.shape[-1])
        cos, sin = (angle[:, None].expand(-1, index.shape[1], -1, -1).gather(2, place) for angle in (cos, sin))
        return rotate(states, cos, sin)


def published_layout(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (or gradients) `[G, d, D]`, three of them, and `[G, D, d]` as `[G, D, 3 * d]` and `[G, d, D]`."""
    joint = torch.cat((query, key, value), dim=1).transpose(1, 2).contiguous()
    return joint, output.transpose(1, 2).contiguous()
