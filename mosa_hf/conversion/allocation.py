"""Which key/value groups become sparse, and what share of the tokens each selects (docs/design.md, section 6)."""

import torch

from ..modeling.configuration import SparseGroupsConfig
from ..modeling.group_plan import GroupPlan, SparseGroup
from ..modeling.thresholds import highest_share
from .calibration import RouterFit
from .configuration import ConversionConfig


def candidate_plan(config: SparseGroupsConfig, conversion: ConversionConfig) -> GroupPlan:
    """
    The groups that may become sparse: those that `conversion` names, else all of the layers with global attention.

    Args:
        config: of the model, without a plan.

    Raises:
        ValueError: for groups that the model lacks, or that cannot be sparse.
    """
    num_layers, num_groups = config.num_hidden_layers, config.num_groups
    sliding = [layer for layer in range(num_layers) if config.is_sliding(layer)]
    if conversion.plan is not None:
        conversion.plan.validate(num_layers, num_groups, sliding)
        if not conversion.plan.sparse_pairs():
            raise ValueError("The plan leaves every group dense: there is nothing to convert.")
        return conversion.plan
    group = SparseGroup(window=conversion.window, sparsity=conversion.sparsity)
    plan = GroupPlan.uniform(num_layers, num_groups, group, sliding)
    possible = plan.sparse_pairs()
    if not possible:
        raise ValueError("Every layer has a sliding window, which bounds its cache: there is nothing to convert.")
    if isinstance(conversion.groups, int) and conversion.groups > len(possible):
        raise ValueError(
            f"`groups={conversion.groups}`: the model has {len(possible)} key/value groups that can be sparse, "
            f"{num_groups} in each of {num_layers - len(sliding)} layers with global attention."
        )
    if isinstance(conversion.groups, tuple):
        if unknown := sorted(set(conversion.groups) - set(possible)):
            raise ValueError(
                f"`groups` names {unknown}, but the model has layers < {num_layers}, groups < {num_groups}"
                + (f", and its layers {sliding} have a sliding window and stay dense." if sliding else ".")
            )
        return _only(plan, conversion.groups)
    return plan


def choose_groups(
    conversion: ConversionConfig, candidates: GroupPlan, fits: list[RouterFit | None] | None
) -> GroupPlan:
    """`candidates`; or as many of them as `conversion` asks for, those that lose least."""
    pairs = candidates.sparse_pairs()
    if fits is None and any(candidates.layers[layer][group].sparsity != 1 for layer, group in pairs):
        raise ValueError("`calibration` is needed to fit routers: pass token ids [windows, tokens] of some text.")
    if not isinstance(conversion.groups, int) or conversion.groups == len(pairs):
        return candidates
    if fits is None:
        raise ValueError("`calibration` is needed to rank groups: pass it, or name the `groups`.")
    losses = mean_losses(candidates, fits)
    ranked = sorted(pairs, key=lambda pair: losses[pair[0]][pair[1]])
    return _only(candidates, ranked[: conversion.groups])


def one_threshold(plan: GroupPlan, candidates: GroupPlan, fits: list[RouterFit | None]) -> GroupPlan:
    """
    `plan` with the sparsities that its groups have under one threshold for all of them, which selects as many tokens
    of the calibration text as the plan's own sparsities would: groups whose tokens matter more select more of them.

    Args:
        plan: some or all groups of `candidates`.
        candidates: the plan that `fits` are of.
    """
    predicted = of_groups(candidates, [None if fit is None else fit.predicted for fit in fits])
    pairs = plan.sparse_pairs()
    logits = torch.stack([predicted[pair][:, 1:].flatten() for pair in pairs])  # first tokens: a case of their own
    kinds = [plan.layers[layer][group] for layer, group in pairs]
    overall = len(kinds) / sum(1 / kind.sparsity for kind in kinds)
    threshold = highest_share(logits.view(-1, 1), [overall])
    least = 1 / predicted[pairs[0]].shape[1]  # a token of each window
    rates = (logits >= threshold).float().mean(1).clamp(min=least).tolist()
    sparse = {
        pair: SparseGroup(kind.window, max(round(1 / rate, 2), 1.0))
        for pair, kind, rate in zip(pairs, kinds, rates, strict=True)
    }
    return GroupPlan(
        tuple(
            tuple(sparse.get((layer, group)) for group in range(len(groups)))
            for layer, groups in enumerate(plan.layers)
        )
    )


def fits_of(plan: GroupPlan, candidates: GroupPlan, fits: list[RouterFit | None]) -> list[RouterFit | None]:
    """
    The fits of the groups of a plan.

    Args:
        plan: some or all groups of `candidates`.
        candidates: the plan that `fits` are of.
    """
    own: list[RouterFit | None] = []
    for groups, all_groups, fit in zip(plan.layers, candidates.layers, fits, strict=True):
        fitted = [group for group, kind in enumerate(all_groups) if kind is not None]
        kept = [fitted.index(group) for group, kind in enumerate(groups) if kind is not None]
        own.append(
            RouterFit(fit.weight[kept], fit.bias[kept], fit.predicted[..., kept], fit.importance[..., kept])
            if kept
            else None
        )
    return own


def mean_losses(candidates: GroupPlan, fits: list[RouterFit | None]) -> list[list[float | None]]:
    """
    For each layer and group the mean importance of a token that it does not select, under one threshold for all
    candidates; None for groups that are none.
    """
    predicted, importance = (
        of_groups(candidates, [None if fit is None else getattr(fit, name) for fit in fits])
        for name in ("predicted", "importance")
    )
    rates = one_threshold(candidates, candidates, fits)
    losses: list[list[float | None]] = [[None] * len(groups) for groups in candidates.layers]
    for (layer, group), logits in predicted.items():
        logits, tokens = logits[:, 1:].flatten(), importance[layer, group][:, 1:].flatten()
        threshold = highest_share(logits[:, None], [rates.layers[layer][group].sparsity])
        losses[layer][group] = float((tokens * (logits < threshold)).mean())
    return losses


def of_groups(candidates: GroupPlan, states: list[torch.Tensor | None]) -> dict[tuple[int, int], torch.Tensor]:
    """`states` [N, T, G] of each layer's candidates as `(layer, group)` → `[N, T]`."""
    found = {}
    for layer, (groups, own) in enumerate(zip(candidates.layers, states, strict=True)):
        fitted = [group for group, kind in enumerate(groups) if kind is not None]
        found |= {(layer, group): own[..., i] for i, group in enumerate(fitted)}
    return found


def _only(plan: GroupPlan, pairs) -> GroupPlan:
    """The plan with all but some `(layer, group)` pairs dense."""
    return GroupPlan(
        tuple(
            tuple(kind if (layer, group) in pairs else None for group, kind in enumerate(groups))
            for layer, groups in enumerate(plan.layers)
        )
    )
