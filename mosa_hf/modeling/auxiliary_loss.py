"""The routers' auxiliary loss of the native model, carried by the decoder's hidden states (docs/routing.md)."""

from typing import Any

import torch
from torch import nn

from ..routing import select_by_expert_choice
from ..routing.layout import CallLayout
from .devices import num_processes
from .router import MosaRouter


def router_loss(logits: torch.Tensor, router: MosaRouter, layout: CallLayout) -> torch.Tensor:
    """
    Of one layer: binary cross-entropy between sigmoid(z) and "among the K highest of its sequence", averaged over
    tokens and groups (the auxiliary loss of Mixture-of-Depths).

    Args:
        router: of the layer.
        logits: `[B, T, G]` float32, of `router` in a call of this layout.
        layout: of the call.

    Raises:
        ValueError: under reentrant gradient checkpointing, which hands out logits without a graph.
    """
    if torch.is_grad_enabled() and router.weight.requires_grad and not logits.requires_grad:
        raise ValueError(
            "`mosa_router_aux_loss_coef` has no effect under reentrant gradient checkpointing: use "
            "`use_reentrant=False`, or set it to 0."
        )
    layout = layout.to(logits.device)
    valid = layout.valid
    target, _ = select_by_expert_choice(
        logits.detach(), router.sparsity[0], router.min_tokens, valid, segment=layout.segment
    )
    weight = torch.ones_like(logits) if valid is None else valid[..., None].expand_as(logits).to(logits.dtype)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weight, reduction="sum")
    return loss / weight.sum()


class CarriedLoss(torch.autograd.Function):
    """
    Hidden states and an auxiliary loss, as they are. The loss gets the gradient that comes to it, if someone has made
    it part of theirs, with whatever factors they put on it. Else it gets one if the hidden states do: a loss that
    others compute of these carries it.

    `scale`: that gradient, for a loss that is a mean over this call. `num_items`: the tokens over which the loss is a
    mean, those of all processes, if it is known; then this call has the part of it that its tokens are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        loss: torch.Tensor,
        scale: float,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.scale, ctx.num_items = scale, num_items
        return hidden_states.view_as(hidden_states), loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, of_states: torch.Tensor, of_loss: torch.Tensor):
        num_tokens = (of_states != 0).any(dim=-1).sum()  # that the loss is about
        if ctx.num_items is None:
            share = (num_tokens > 0).to(of_loss)
        else:
            # Gradients are averaged, each of a loss that was multiplied by the number of processes (`Trainer`).
            share = (num_tokens * num_processes() / ctx.num_items).to(of_loss)
        return of_states, torch.where(of_loss == 0, ctx.scale * share, of_loss), None, None


def share_of_items(
    labels: torch.Tensor, shift_labels: torch.Tensor | None, num_items: torch.Tensor | int | None
) -> torch.Tensor | float:
    """
    The part that a call with these `labels` [B, T] has of the `num_items` tokens over which its loss is a mean, as
    `Trainer` counts them; all of it if `num_items` is None. `shift_labels` [B, T]: as the loss takes them.
    """
    if num_items is None:
        return 1.0
    own = ((labels[..., 1:] if shift_labels is None else shift_labels) != -100).sum()
    return own / (num_items.to(own.device) if isinstance(num_items, torch.Tensor) else num_items)
