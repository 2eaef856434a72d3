"""The paper's heads of one layer (docs/design.md, section 2): routers, projections of selected tokens, the output."""

import torch
from torch import nn

from ..cache import GroupSet, Routed, SparseLayer, SparseSpec
from ..kernels import backend
from ..kernels.tensors import HeadWeights, Tokens
from ..routing.budget import evicted_at
from .configuration import RoutingConfig
from .forward_context import ForwardContext
from .router import MosaRouter, active_module


class MosaHeads(nn.Module):
    """
    The MoSA heads of one layer: selected tokens attend to each other, other tokens get nothing. Projections are stored
    group by group as `[group, out, in]`.

    Args:
        config: the layer's configuration (`config.per_layer_config[i]`).
    """

    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, config: RoutingConfig):
        super().__init__()
        self.budget = config.mosa_cache_budget
        self.num_groups = config.num_mosa_key_value_heads
        self.head_dim = config.head_dim
        query_dim = config.num_mosa_heads // self.num_groups * self.head_dim  # R * d

        self.router = MosaRouter(config, [config.mosa_sparsity] * self.num_groups)
        self.q_proj = nn.Parameter(torch.empty(self.num_groups, query_dim, config.hidden_size))
        self.k_proj = nn.Parameter(torch.empty(self.num_groups, self.head_dim, config.hidden_size))
        self.v_proj = nn.Parameter(torch.empty(self.num_groups, self.head_dim, config.hidden_size))
        self.o_proj = nn.Parameter(torch.empty(self.num_groups, config.hidden_size, query_dim))
        for name, size in (("q_bias", query_dim), ("k_bias", self.head_dim), ("v_bias", self.head_dim)):
            self.register_parameter(
                name, nn.Parameter(torch.empty(self.num_groups, size)) if config.attention_bias else None
            )
        self.num_dense_groups = config.num_key_value_heads if config.num_attention_heads else 0
        # The layer's output bias belongs to the dense heads' `o_proj`, where there are any.
        needs_output_bias = config.attention_bias and not self.num_dense_groups
        self.o_bias = nn.Parameter(torch.empty(config.hidden_size)) if needs_output_bias else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        call: ForwardContext,
        cache: SparseLayer | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, D]`.
            position_embeddings: cos and sin `[B or 1, T, rotary_dim]`.
            call: of the model.
            cache: this layer's, which takes in the call's tokens.

        Returns:
            `[B, T, D]`: the heads' outputs after W_O, summed; zero on padding.

        Raises:
            ValueError: for expert-choice routing on top of cached tokens.
        """
        router = active_module(self.router)
        layout = call.layout.to(hidden_states.device)
        logits, selected = self.router(hidden_states, call, cache, follows=cache is None)
        if call.router_logits is not None:  # the first ones, if checkpointing computes them again
            call.router_logits.setdefault(router, logits)
        needs_score = self.budget is not None or (cache is not None and cache.needs_score)
        score = router.score(logits, layout.first) if needs_score else None
        if cache is not None:
            cache.begin(layout, [Routed(selected, score)])
        cos, sin = (x.to(hidden_states.device).expand(hidden_states.shape[0], -1, -1) for x in position_embeddings)
        tokens = Tokens(layout.position, layout.valid, layout.segment, cos, sin, selected, logits.sigmoid(), score)
        hidden_states = layout.pad_left(hidden_states, dim=1)
        # A list: of a generator torch 2.9 cannot go on with what came before a break in a graph.
        tokens = Tokens._make([layout.pad_left(x, dim=1) if isinstance(x, torch.Tensor) else x for x in tokens])
        if cache is not None:
            output = self._attend_cached(hidden_states, tokens, cache)
        else:
            if score is not None:
                tokens = tokens._replace(evicted_at=self._evictions(tokens))
            output, _ = backend(hidden_states, self.head_dim).selected_heads(hidden_states, self._weights(), tokens)
        if self.o_bias is not None:
            output = output + self.o_bias
        if tokens.valid is not None:
            output = output.masked_fill(~tokens.valid[..., None], 0.0)
        return layout.pad_back(output, dim=1)

    def _attend_cached(self, hidden_states: torch.Tensor, tokens: Tokens, cache: SparseLayer) -> torch.Tensor:
        """Attention over the cache and the call's own tokens, which the cache takes in."""
        weights, store = self._weights(), cache.stores[0]
        is_host = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        kernels = backend(hidden_states, self.head_dim)
        if not is_host and not torch.is_grad_enabled() and store.takes_one_token():
            return kernels.selected_heads(hidden_states, weights, tokens, store.remember)[0]
        past, evicted = store.read(tokens.position)
        tokens = tokens._replace(
            evicted_at=None if evicted is None else evicted.transpose(1, 2),
            num_selected=None if store.counts is None else store.counts.num_far,
        )
        # Where gradients are wanted, those of groups that select nothing are: they are 0.
        looks = is_host and not torch.is_grad_enabled()
        groups = tokens.selected.flatten(0, 1).any(dim=0).nonzero()[:, 0] if looks else None
        if groups is None or len(groups) == self.num_groups:
            output, new = kernels.selected_heads(hidden_states, weights, tokens, past)
            store.append(new)
            return output
        # Groups that select nothing cost nothing: neither their weights nor their cache are read.
        output, new = torch.zeros_like(hidden_states), None
        if len(groups):
            weights = HeadWeights._make([None if weight is None else weight[groups] for weight in weights])
            tokens = tokens._replace(
                selected=tokens.selected[..., groups],
                gate=tokens.gate[..., groups],
                score=None if tokens.score is None else tokens.score[..., groups],
                evicted_at=None if tokens.evicted_at is None else tokens.evicted_at[..., groups],
            )
            if past is not None:
                past = past._replace(start=past.start[:, groups], length=past.length[:, groups], stride=None)
            output, new = kernels.selected_heads(hidden_states, weights, tokens, past)
        store.append(new, groups)
        return output

    def _weights(self) -> HeadWeights:
        # Of a router that an adapter wraps or FSDP shards, the weight may be read in its own forward only.
        router = (self.router.weight, self.router.bias) if type(self.router) is MosaRouter else (None, None)
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.q_bias, self.k_bias, self.v_bias)
        return HeadWeights(*projections, *router)

    def _evictions(self, tokens: Tokens) -> torch.Tensor | None:
        """`[B, T, G]`: when the budget evicts the tokens of a call without a cache."""
        assert tokens.score is not None and self.budget is not None
        selected, score = tokens.selected.transpose(1, 2), tokens.score.transpose(1, 2)
        segment = None if tokens.segment is None else tokens.segment[:, None]
        evicted = evicted_at(score, tokens.position[:, None].expand_as(selected), selected, self.budget, segment)
        return None if evicted is None else evicted.transpose(1, 2)

    def cache_spec(self) -> SparseSpec:
        """What a cache has to know of these heads."""
        groups = GroupSet(tuple(range(self.num_groups)), 0, active_module(self.router).sparsity[0])
        return SparseSpec(None, (groups,), self.budget, self.num_dense_groups)
