"""Which key/value groups become sparse, and what share of the tokens each selects (docs/design.md, section 6)."""

from collections.abc import Iterable

import torch

from ..modeling.configuration import SparseGroupsConfig
from ..modeling.group_plan import GroupPlan, SparseGroup, sparse_among
from ..modeling.thresholds import highest_share
from .calibration import RouterFit
from .configuration import ConversionConfig


def candidate_plan(config: SparseGroupsConfig, conversion: ConversionConfig) -> GroupPlan:
    """
    The groups that may become sparse: those that `conversion` names, else all of the layers with global attention.

    Args:
        config: of the model, without a plan.
        conversion: whose `plan` or `groups` are looked at, with `window` and `sparsity` for the latter.

    Raises:
        ValueError: for groups that the model lacks, or that cannot be sparse.
    """
    num_layers = config.num_hidden_layers
    num_groups = [config.num_groups_of(layer) for layer in range(num_layers)]
    dense = config.dense_layers()
    if conversion.plan is not None:
        assert isinstance(conversion.plan, GroupPlan)  # a path has been read
        config.check_plan(conversion.plan)
        if not conversion.plan.sparse_pairs():
            raise ValueError("The plan leaves every group dense: there is nothing to convert.")
        return conversion.plan
    group = SparseGroup(window=conversion.window, sparsity=conversion.sparsity)
    plan = GroupPlan.uniform(num_layers, num_groups, group, dense)
    possible = plan.sparse_pairs()
    if not possible:
        reasons = sorted({str(config.why_dense(layer)) for layer in dense})
        raise ValueError(f"There is nothing to convert: of every layer, {', or '.join(reasons)}.")
    if isinstance(conversion.groups, int) and conversion.groups > len(possible):
        raise ValueError(
            f"`groups={conversion.groups}`: the model has {len(possible)} key/value groups that can be sparse, "
            f"in {num_layers - len(dense)} layers with global attention."
        )
    if isinstance(conversion.groups, tuple):
        if unknown := sorted(set(conversion.groups) - set(possible)):
            raise ValueError(
                f"`groups` names {unknown}, but the model has layers < {num_layers}, groups < {max(num_groups)}"
                + (f", and its layers {dense} stay dense: {config.why_dense(dense[0])}." if dense else ".")
            )
        return _only(plan, conversion.groups)
    return plan


def choose_groups(
    conversion: ConversionConfig, candidates: GroupPlan, losses: list[list[float | None]] | None
) -> GroupPlan:
    """`candidates`; or as many of them as `conversion` asks for, those with the least of `mean_losses`."""
    pairs = candidates.sparse_pairs()
    if losses is None and any(group.sparsity != 1 for group in candidates.sparse().values()):
        raise ValueError("`calibration` is needed to fit routers: pass token ids [windows, tokens] of some text.")
    if not isinstance(conversion.groups, int) or conversion.groups == len(pairs):
        return candidates
    if losses is None:
        raise ValueError("`calibration` is needed to rank groups: pass it, or name the `groups`.")
    ranked = sorted((losses[layer][group], (layer, group)) for layer, group in pairs)
    return _only(candidates, [pair for _, pair in ranked[: conversion.groups]])


def one_threshold(plan: GroupPlan, candidates: GroupPlan, fits: list[RouterFit | None]) -> GroupPlan:
    """
    `plan` with the sparsities that its groups have under one threshold for all of them, which selects as many tokens
    of the calibration text as the plan's own sparsities would: groups whose tokens matter more select more of them.

    Args:
        plan: some or all groups of `candidates`.
        candidates: the plan that `fits` are of.
        fits: of each layer, None for one without sparse groups.
    """
    logits = _tokens(plan, candidates, fits, "predicted")
    least = 1 / next(fit.predicted.shape[1] for fit in fits if fit is not None)  # a token of each window
    wanted = sum(1 / group.sparsity for group in plan.sparse().values())
    rates = torch.full((len(logits),), least, dtype=torch.float32)
    more = torch.ones(len(logits), dtype=torch.bool)  # that select more than the least
    while more.any():
        # What groups get that would select nothing, the others do without.
        share = max((wanted - least * int((~more).sum())) / int(more.sum()), least)
        threshold = highest_share(logits[more].view(-1, 1), [max(1 / share, 1.0)])
        found = (logits >= threshold).float().mean(1)
        if not (starved := more & (found < least)).any():
            rates[more] = found[more]
            break
        more &= ~starved
    sparse = {
        pair: SparseGroup(group.window, max(round(1 / rate, 2), 1.0))
        for (pair, group), rate in zip(plan.sparse().items(), rates.tolist(), strict=True)
    }
    return plan.with_sparse(sparse)


def fits_of(plan: GroupPlan, candidates: GroupPlan, fits: list[RouterFit | None]) -> list[RouterFit | None]:
    """
    The fits of the groups of a plan.

    Args:
        plan: some or all groups of `candidates`.
        candidates: the plan that `fits` are of.
        fits: of each layer, None for one without sparse groups.

    Raises:
        ValueError: for fits of another plan.
    """
    if [fit is not None for fit in fits] != [any(groups) for groups in candidates.layers]:
        raise ValueError("`fits` must be what `fit_routers` gave for the `candidate_plan` of this model.")
    own: list[RouterFit | None] = []
    for groups, all_groups, fit in zip(plan.layers, candidates.layers, fits, strict=True):
        fitted = sparse_among(all_groups)
        kept = [fitted.index(group) for group in sparse_among(groups)]
        if not kept:
            own.append(None)
        else:
            assert fit is not None
            parts = (fit.weight[kept], fit.bias[kept], fit.predicted[..., kept], fit.importance[..., kept])
            own.append(RouterFit(*parts, fit.offset))
    return own


def mean_losses(candidates: GroupPlan, fits: list[RouterFit | None]) -> list[list[float | None]]:
    """
    The mean importance of a token that a group does not select, for each layer and group, under one threshold for all
    candidates; None for groups that are none.
    """
    logits, importance = (_tokens(candidates, candidates, fits, name) for name in ("predicted", "importance"))
    lost = (importance * (logits < _threshold(candidates, logits))).mean(1).tolist()
    losses: list[list[float | None]] = [[None] * len(groups) for groups in candidates.layers]
    for (layer, group), loss in zip(candidates.sparse_pairs(), lost, strict=True):
        losses[layer][group] = loss
    return losses


def _tokens(plan: GroupPlan, candidates: GroupPlan, fits: list[RouterFit | None], name: str) -> torch.Tensor:
    """What the fits of a plan's groups have as `name`, `[groups, tokens]`; first tokens are a case of their own."""
    states = of_groups(candidates, [None if fit is None else getattr(fit, name) for fit in fits])
    return torch.stack([states[pair][:, 1:].flatten() for pair in plan.sparse_pairs()])


def _threshold(plan: GroupPlan, logits: torch.Tensor) -> torch.Tensor:
    """The one with which `logits` [groups, tokens] select as many tokens as the plan's own sparsities would."""
    groups = plan.sparse().values()
    overall = len(groups) / sum(1 / group.sparsity for group in groups)
    return highest_share(logits.view(-1, 1), [overall])


def of_groups(candidates: GroupPlan, states: list[torch.Tensor | None]) -> dict[tuple[int, int], torch.Tensor]:
    """`states` [N, T, G] of each layer's candidates as `(layer, group)` → `[N, T]`."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for layer, (groups, own) in enumerate(zip(candidates.layers, states, strict=True)):
        for i, group in enumerate(sparse_among(groups)):
            assert own is not None
            found[layer, group] = own[..., i]
    return found


def _only(plan: GroupPlan, pairs: Iterable[tuple[int, int]]) -> GroupPlan:
    """The plan with all but some `(layer, group)` pairs dense."""
    sparse = plan.sparse()
    return plan.with_sparse({pair: sparse[pair] for pair in pairs})
