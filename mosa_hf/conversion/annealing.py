"""Rates that fall while a model heals: groups begin with every token and end at what they were converted to."""

from collections.abc import Iterable

import torch
from transformers import TrainerCallback
from transformers.modeling_utils import PreTrainedModel

from ..modeling.thresholds import highest_share, mosa_routers, seen_logits


class RateAnnealing(TrainerCallback):
    """
    Over the first `steps` steps of a training, each group's rate falls from 1 to 1/ρ, by the same factor each step.
    Selection is hard all along: thresholds rise, along the quantiles that logits have on some text, to where they are
    now. Between steps they are there already, so that what is evaluated or saved has the final ones. A step's
    thresholds depend on its number alone: a run goes on as it would have without the interruption, given the same
    model and text.

    Args:
        model: with sparse groups, before it learns or has adapters.
        batches: text, as `calibrate_thresholds` takes it.
        steps: after which rates are final.

    Raises:
        ValueError: for routers that learn, whose thresholds follow them; for less than one step.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[torch.Tensor], steps: int):
        if steps < 1:
            raise ValueError(f"Rates fall over {steps} steps: anneal over at least one.")
        self.routers, self.steps = mosa_routers(model), steps
        if any(router.weight.requires_grad and router.momentum < 1 for router in self.routers):
            raise ValueError("Thresholds of routers that learn follow their logits: anneal with frozen routers.")
        self.logits = seen_logits(model, batches)
        self.final = [router.threshold.clone() for router in self.routers]

    def thresholds(self, step: int) -> list[torch.Tensor]:
        """The thresholds of each router, `[G]`, in a step; the first is 0."""
        if step >= self.steps:
            return self.final
        return [
            self._between(router.sparsity, logits, final.cpu(), step / self.steps)
            for router, logits, final in zip(self.routers, self.logits, self.final, strict=True)
        ]

    @staticmethod
    def _between(
        sparsity: tuple[float, ...], logits: torch.Tensor, final: torch.Tensor, progress: float
    ) -> torch.Tensor:
        if progress == 0:
            lower = torch.full_like(final, -torch.inf)
        else:
            # Shifted by what lies between the text's quantile at the final rate and the threshold that groups have.
            now = highest_share(logits, [each**progress for each in sparsity])
            lower = torch.minimum(now + (final - highest_share(logits, sparsity)), final)
        return torch.where(final.isfinite(), lower, final)  # of a group that selects all, or nothing

    @torch.no_grad()
    def _set(self, thresholds: list[torch.Tensor]) -> None:
        for router, threshold in zip(self.routers, thresholds, strict=True):
            router.threshold.copy_(threshold)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.max_steps < self.steps:
            raise ValueError(
                f"Rates fall over {self.steps} steps, but the training has {state.max_steps}: the model would end at "
                "other rates than it is saved with."
            )

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._set(self.thresholds(state.global_step))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._set(self.final)
