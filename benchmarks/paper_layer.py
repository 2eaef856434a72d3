"""
The MoSA layer as the paper's equations read (arXiv 2505.00315, section 2), the rival that our kernels are timed
against: one query head a group, tokens in the order in which `topk` returns them, and a mask for every head.
"""

import torch
from torch import nn

from mosa_hf.kernels.layout import rotate
from mosa_hf.modeling.heads import MosaHeads


class PaperLayer(nn.Module):
    """
    Heads of form "selected" with expert choice. Shares the parameters of `heads`, and computes the same function while
    these train with `mosa_include_first=False`.

    Raises:
        ValueError: for heads that the paper does not have.
    """

    def __init__(self, heads: MosaHeads):
        super().__init__()
        if heads.query_tokens != "selected" or heads.q_proj.shape != heads.k_proj.shape or heads.q_bias is not None:
            raise ValueError("The paper's heads are of form 'selected', with one query head a group and no biases.")
        self.router = heads.router
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, D]`.
            cos, sin: `[B, T, rotary_dim]`.

        Returns:
            `[B, T, D]`: the heads' outputs after W_O, summed.
        """
        num_tokens, head_dim = hidden_states.shape[1], self.k_proj.shape[1]
        num_selected = max(int(num_tokens / self.router.sparsity), self.router.min_tokens)
        # r = sigmoid(x W_r); the scores and positions of the k highest of each head
        scores = torch.sigmoid(hidden_states.float() @ self.router.weight.float().T)  # [B, T, G]
        gate, position = scores.transpose(1, 2).topk(num_selected, dim=-1)  # [B, G, K]

        def gather(states: torch.Tensor) -> torch.Tensor:  # [B, T, N] -> [B, G, K, N]
            states = states[:, None].expand(-1, position.shape[1], -1, -1)
            return states.gather(2, position[..., None].expand(*position.shape, states.shape[-1]))

        selected = gather(hidden_states)  # [B, G, K, D]
        query, key, value = (
            torch.einsum("bgkn,gdn->bgkd", selected, weight) for weight in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = gather(cos), gather(sin)
        query, key = rotate(query, *angles), rotate(key, *angles)

        mask = position[..., :, None] >= position[..., None, :]  # [B, G, K, K]
        attention = torch.einsum("bgqd,bgkd->bgqk", query, key) * head_dim**-0.5
        attention = attention.masked_fill(~mask, -torch.inf).softmax(-1)
        heads = torch.einsum("bgqk,bgkd->bgqd", attention, value)
        heads = heads * gate[..., None].to(heads.dtype)

        output = torch.einsum("bgkd,gnd->bgkn", heads, self.o_proj)  # [B, G, K, D]
        place = position.flatten(1)[..., None].expand(-1, -1, hidden_states.shape[2])
        return torch.zeros_like(hidden_states).scatter_add(1, place, output.flatten(1, 2))
