"""What a training does to routing, for those who watch it."""

import torch
from transformers import TrainerCallback

from .router import routers_of


class RoutingCallback(TrainerCallback):
    """
    Adds to what `Trainer` logs, while routers learn: "selected", the share of tokens that groups select on average,
    and "selected_least" and "selected_most", the lowest and the highest share of a group times its ρ, 1 being what was
    asked for. They are moving averages over training calls. The history and the progress bar have them; so do
    reporters that come later among the callbacks than this one.

    Where others compute the loss (TRL's `SFTTrainer`), it also makes the native model's auxiliary loss the mean over a
    step's micro-batches, whose number is `gradient_accumulation_steps`. `Trainer` tells nobody of a training that was
    interrupted: the factor stays until the next one begins. To train on without `Trainer` then, set
    `model.base_model.aux_loss_scale = 1.0`.

    ```python
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[RoutingCallback()])
    ```
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        for module in model.modules():
            if hasattr(module, "aux_loss_scale"):
                module.aux_loss_scale = 1 / args.gradient_accumulation_steps

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        for module in model.modules():
            if hasattr(module, "aux_loss_scale"):
                module.aux_loss_scale = 1.0

    def on_log(self, args, state, control, model=None, logs=None, **kwargs) -> None:
        if logs is None or "loss" not in logs:  # of an evaluation, or a summary
            return
        logs.update(shares := selected_shares(model))
        if state.log_history:  # which has a copy
            state.log_history[-1].update(shares)


def selected_shares(model: torch.nn.Module) -> dict[str, float]:
    """
    The moving averages of what the groups of `model` select in training, see `RoutingCallback`; nothing if no router
    has learned yet.

    Raises:
        ValueError: for a model without routers.
    """
    routers = [router for router in routers_of(model) if router.num_followed]
    if not routers:
        return {}
    share = torch.cat([router.share.float().cpu() for router in routers])
    relative = share * torch.cat([router.sparsity_of_groups(share.device) for router in routers])
    values = {"selected": share.mean(), "selected_least": relative.min(), "selected_most": relative.max()}
    return {name: round(value.item(), 4) for name, value in values.items()}
