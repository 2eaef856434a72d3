"""What the groups of a model keep of a text, token by token, and a page that shows it."""

import base64
import json
import os
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import checked
from ..atomic_write import atomic_file
from ..modeling.configuration import SparseGroupsConfig
from ..modeling.devices import input_device
from ..modeling.forward_context import ForwardContext, ForwardContextMixin
from ..modeling.group_plan import GroupPlan, SparseGroup
from ..modeling.layers import decoder_of, layer_of
from ..modeling.modes import evaluating
from ..modeling.router import MosaRouter, named_routers
from ..modeling.token_ids import check_num_tokens, check_token_ids
from ..routing.budget import evicted_at

PAGE = "trace_page.html"  # beside this file
DATA = "TRACE"  # what the page has in the place of the data


@dataclass(frozen=True)
class TracedGroup:
    """
    A sparse group, and what it keeps of a text of T tokens.

    Args:
        layer, group: which one it is; both count from 0.
        window: tokens that stay whether selected or not; 0 for the paper's heads.
        selected: `[T]` bool.
        until: `[T]` int64, the first token at which a budget has evicted each one; None: nothing is.
    """

    layer: int
    group: int
    window: int
    selected: torch.Tensor
    until: torch.Tensor | None = None

    @checked()
    def in_cache(self, at: int) -> torch.Tensor:
        """
        The tokens that the group's cache holds once one has been read.

        Args:
            at: that token, counted from 0; it is included.

        Returns:
            `[T]` bool.

        Raises:
            ValueError: for a token that the text does not have.
        """
        if not 0 <= at < len(self.selected):
            raise ValueError(f"`at` must be one of the text's {len(self.selected)} tokens, counted from 0, got {at}.")
        position = torch.arange(len(self.selected))
        kept = self.selected if self.until is None else self.selected & (at < self.until)
        return (kept | (at - position < self.window)) & (position <= at)


@dataclass(frozen=True)
class TracedText:
    """
    A text, and what each group of a model keeps of it.

    Args:
        name: of the model.
        pieces: the text, token by token.
        groups: the sparse groups, by layer and group.
        dense: `(layer, group)` of those that are as in the original.
    """

    name: str
    pieces: list[str]
    groups: list[TracedGroup]
    dense: list[tuple[int, int]]

    def in_cache(self, at: int) -> torch.Tensor:
        """`[len(groups), T]` bool, see `TracedGroup.in_cache`."""
        return torch.stack([group.in_cache(at) for group in self.groups])

    def page(self) -> str:
        """A page of HTML that needs nothing else: no network, no other file."""
        groups = [
            {
                "layer": each.layer,
                "group": each.group,
                "window": each.window,
                "selected": _bits(each.selected),
                # Only of what is evicted: position, and when.
                "evicted": [] if each.until is None else _evictions(each.selected, each.until),
            }
            for each in self.groups
        ]
        data = {"name": self.name, "pieces": self.pieces, "groups": groups, "dense": self.dense}
        # Nothing but "<" can end a script element.
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        return files(__package__).joinpath(PAGE).read_text(encoding="utf-8").replace(DATA, text, 1)

    @checked()
    def save(self, path: str | os.PathLike) -> None:
        """Write the page; it replaces another one at once."""
        with atomic_file(Path(path)) as unfinished:
            unfinished.write_text(self.page(), encoding="utf-8")


@checked()
@torch.no_grad()
def trace_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None = None
) -> TracedText:
    """
    What every sparse group of `model` keeps of a text, as `generate` would: by thresholds, and within the budget.

    Args:
        model: with MoSA heads of either form.
        tokenizer: the model's.
        text: from its beginning.
        max_tokens: of the text, the others are left out; None: all.

    Raises:
        ValueError: for a model without MoSA heads or one that selects by expert choice, where what is kept depends on
            later tokens; for an empty text, for a `max_tokens` below 1, and for more tokens than the model reads.

    ```python
    mosa_hf.evaluation.trace_text(model, tokenizer, text).save("trace.html")
    ```
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}.")
    routers = _routers_by_thresholds(model)
    input_ids, pieces = _tokens(tokenizer, text, max_tokens)
    if not pieces:
        raise ValueError("`text` has no tokens.")
    check_num_tokens(len(pieces), model.config, "the text", "set a smaller `max_tokens`, or give a shorter text")
    decoder = decoder_of(model)
    cast(ForwardContextMixin, decoder).update_config()  # layers may have moved, with budgets of their own
    config = model.config.get_text_config(decoder=True)
    check_token_ids(input_ids, config.vocab_size, "text")
    routed: dict[MosaRouter, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def record(budget: int | None, router: MosaRouter, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        logits, selected = (states.transpose(1, 2) for states in output)  # [1, G, T]
        until = None
        if budget is not None:
            call: ForwardContext = args[1]
            score = router.score(output[0], call.layout.first).transpose(1, 2)
            position = torch.arange(logits.shape[-1], device=logits.device).expand_as(selected)
            until = evicted_at(score, position, selected, budget)
        routed[router] = selected[0].cpu(), None if until is None else until[0].cpu()

    layers = config.per_layer_config
    budgets = {name: layers[layer_of(name, model)].mosa_cache_budget for name in routers}
    hooks = [router.register_forward_hook(partial(record, budgets[name])) for name, router in routers.items()]
    try:
        with evaluating(model):
            decoder(input_ids=input_ids.to(input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    plan = GroupPlan.of_config(config).layers if isinstance(config, SparseGroupsConfig) else None
    groups = []
    for name, router in routers.items():
        layer, (selected, until) = layer_of(name, model), routed[router]
        own = _PAPERS * len(selected) if plan is None else plan[layer]
        sparse = [(i, group.window) for i, group in enumerate(own) if group is not None]
        groups += [
            TracedGroup(layer, i, window, selected[column], None if until is None else until[column])
            for column, (i, window) in enumerate(sparse)
        ]
    dense = [(layer, i) for layer, own in enumerate(plan or ()) for i, group in enumerate(own) if group is None]
    return TracedText(getattr(config, "_name_or_path", "") or type(model).__name__, pieces, groups, dense)


def _routers_by_thresholds(model: PreTrainedModel) -> dict[str, MosaRouter]:
    """The routers of a model by name; raises if there are none, and if they read later tokens."""
    routers = dict(named_routers(model))
    if not routers:
        raise ValueError(f"{type(model).__name__} has no MoSA heads: there is nothing that it selects.")
    if any(router.inference_routing != "threshold" for router in routers.values()):
        raise ValueError(
            "`mosa_inference_routing` is 'expert_choice', which selects from a whole text: no cache is filled by it. "
            "Load the model with `mosa_inference_routing='threshold'`."
        )
    return routers


_PAPERS = (SparseGroup(window=0, sparsity=1.0),)  # of the paper's heads: what a group of theirs has beside a router


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None) -> tuple[torch.Tensor, list[str]]:
    """Token ids `[1, T]`, and the part of the text that each one is: together, they are the text."""
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"][:max_tokens]
    if not tokenizer.is_fast:
        return torch.tensor([ids]), [str(tokenizer.decode([token])) for token in ids]
    pieces: list[str] = []
    end = 0
    special = set(tokenizer.all_special_ids)
    for token, (_, stop) in zip(ids, encoded["offset_mapping"], strict=False):
        if token in special:
            pieces.append(str(tokenizer.convert_ids_to_tokens(token)))
        else:  # with the space before it; a character of several tokens belongs to the first of them
            pieces.append(text[end : max(end, stop)])
            end = max(end, stop)
    return torch.tensor([ids]), pieces


def _bits(mask: torch.Tensor) -> str:
    """Base64 of a bool tensor, eight to a byte, the first in the lowest bit."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return base64.b64encode(bytes((padded << torch.arange(8)).sum(-1).tolist())).decode()


def _evictions(selected: torch.Tensor, until: torch.Tensor) -> list[tuple[int, int]]:
    evicted = (selected & (until < len(until))).nonzero()[:, 0].tolist()
    return [(position, int(until[position])) for position in evicted]
