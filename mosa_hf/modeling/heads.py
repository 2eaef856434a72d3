"""The one MoSA module that every model uses: routers and heads of one layer, over the active kernels backend."""

from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from ..cache import FixedSparseKeyValues, SparseKeyValues, SparseSpec
from ..kernels import backend, compiled, portable, reference
from ..kernels.layout import HeadWeights, KeyValues, Tokens, rotate
from ..routing import CallLayout, evicted_at, select_by_expert_choice, select_by_threshold


@dataclass
class RoutingState(CallLayout):
    """
    What the layers of one model call share.

    Attributes:
        thresholds: layer index → the threshold `[G]` that this call routes with in training, so that gradient
            checkpointing recomputes the same selection after the moving average went on.
    """

    thresholds: dict[int, torch.Tensor] = field(default_factory=dict)


class MosaRouter(nn.Linear):
    """
    The routers of a layer's groups: logits, and which tokens they select (DESIGN section 3).

    Computes in float32 (float64 for a float64 model), whatever the model's dtype or autocast. The buffer `threshold`
    [G] follows the groups' K-th highest logit while the weights train.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config.hidden_size, config.num_mosa_key_value_heads, bias=config.mosa_router_bias)
        self.layer_idx = layer_idx
        self.sparsity = config.mosa_sparsity
        self.min_tokens = config.mosa_min_tokens
        self.include_first = config.mosa_include_first
        self.training_routing = config.mosa_routing
        self.inference_routing = config.mosa_inference_routing
        self.momentum = config.mosa_threshold_momentum
        self.register_buffer("threshold", torch.zeros(config.num_mosa_key_value_heads, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` must not round the threshold: a moving average would stall between two values.
        threshold = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:
            self.threshold = threshold.to(self.threshold.device)
        return self

    @property
    def routing(self) -> str:
        """The rule in force: "expert_choice" or "threshold"."""
        return self.training_routing if self.training else self.inference_routing

    def forward(self, hidden_states: torch.Tensor, state: RoutingState) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `[B, T, D]`.
            state: of this model call.

        Returns:
            logits `[B, T, G]` and selected `[B, T, G]` bool.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            bias = None if self.bias is None else self.bias.to(dtype)
            logits = F.linear(hidden_states.to(dtype), self.weight.to(dtype), bias)

        valid, segment = (None if x is None else x.to(logits.device) for x in (state.valid, state.segment))
        first = state.first.to(logits.device) if self.include_first else None
        if self.sparsity == 1:  # nothing to choose, whatever the thresholds are
            selected = torch.ones_like(logits, dtype=torch.bool)
            return logits, selected if valid is None else selected & valid[..., None]
        if self.training or self.routing == "expert_choice":
            selected, last = select_by_expert_choice(
                logits.detach(), self.sparsity, self.min_tokens, valid, first, segment
            )
        threshold = self.threshold
        if self.training and self.weight.requires_grad:  # a frozen router keeps its threshold
            threshold = self._follow(last, state)
        if self.routing == "threshold":
            selected = select_by_threshold(logits.detach(), threshold, valid, first)
        return logits, selected

    @torch.no_grad()
    def _follow(self, last: torch.Tensor, state: RoutingState) -> torch.Tensor:
        """Move `threshold` towards `last` [G], once a model call; returns the threshold that the call routes with."""
        if self.layer_idx not in state.thresholds:
            state.thresholds[self.layer_idx] = self.threshold.clone()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                seen = last.isfinite().float()
                last = torch.stack((last.nan_to_num(), seen))
                torch.distributed.all_reduce(last)
                last = last[0] / last[1]
            moved = self.threshold * self.momentum + last * (1 - self.momentum)
            self.threshold.copy_(torch.where(last.isfinite(), moved, self.threshold))
        return state.thresholds[self.layer_idx]


class MosaHeads(nn.Module):
    """
    The MoSA heads of one layer (DESIGN section 2): routers, per-group projections, and their share of the layer's
    attention output. Projections are stored group by group as `[group, out, in]`.

    Args:
        config: the layer's configuration (`config.per_layer_config[layer_idx]`).
        layer_idx: index of the layer.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.query_tokens = config.mosa_query_tokens
        self.window = config.mosa_window
        self.budget = config.mosa_cache_budget
        self.num_groups = config.num_mosa_key_value_heads
        self.head_dim = config.head_dim
        self.has_dense_heads = config.num_attention_heads > 0  # beside these
        query_dim = config.num_mosa_heads // self.num_groups * self.head_dim  # R * d

        self.router = MosaRouter(config, layer_idx)
        self.q_proj = nn.Parameter(torch.empty(self.num_groups, query_dim, config.hidden_size))
        self.k_proj = nn.Parameter(torch.empty(self.num_groups, self.head_dim, config.hidden_size))
        self.v_proj = nn.Parameter(torch.empty(self.num_groups, self.head_dim, config.hidden_size))
        self.o_proj = nn.Parameter(torch.empty(self.num_groups, config.hidden_size, query_dim))
        for name, size in (("q_bias", query_dim), ("k_bias", self.head_dim), ("v_bias", self.head_dim)):
            self.register_parameter(
                name, nn.Parameter(torch.empty(self.num_groups, size)) if config.attention_bias else None
            )
        # The layer's output bias belongs to the dense heads' `o_proj`, where there are any.
        needs_output_bias = config.attention_bias and not self.has_dense_heads
        self.o_bias = nn.Parameter(torch.empty(config.hidden_size)) if needs_output_bias else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: RoutingState,
        cache: SparseKeyValues | FixedSparseKeyValues | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, D]`.
            position_embeddings: cos and sin `[B or 1, T, rotary_dim]`.
            state: of this model call.
            cache: this layer's sparse cache, which takes in the call's tokens.

        Returns:
            `[B, T, D]`: the heads' outputs after W_O, summed; zero on padding.

        Raises:
            ValueError: for expert-choice routing on top of cached tokens.
        """
        if self.router.routing == "expert_choice" and cache is not None and cache.has_tokens():
            raise ValueError(
                "'expert_choice' routing selects from a whole sequence at once and cannot continue from a cache. Use "
                "`model.eval()` with `mosa_inference_routing='threshold'`, or pass `use_cache=False`."
            )
        logits, selected = self.router(hidden_states, state)
        is_fixed = isinstance(cache, FixedSparseKeyValues)
        tokens = self._tokens(
            logits, selected, position_embeddings, state, hidden_states, self.budget is not None or is_fixed
        )
        order, inverse = (None if x is None else x.to(hidden_states.device) for x in (state.order, state.inverse))
        if order is not None:
            hidden_states = _permute(hidden_states, order)
            tokens = Tokens(*(None if x is None else _permute(x, order) for x in tokens))
        if cache is not None:
            # The mask as it came: `crop` removes tokens from the end of what the caller passed.
            valid = None if state.valid is None else state.valid.to(hidden_states.device)
            cache.advance(valid, hidden_states)
        elif tokens.score is not None:
            tokens = tokens._replace(until=self._evictions(tokens))
        attend = self._selected if self.query_tokens == "selected" else self._all
        output = attend(hidden_states, tokens, cache)
        if self.o_bias is not None:
            output = output + self.o_bias
        if tokens.valid is not None:
            output = output.masked_fill(~tokens.valid[..., None], 0.0)
        return output if inverse is None else _permute(output, inverse)

    def _tokens(
        self,
        logits: torch.Tensor,
        selected: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: RoutingState,
        hidden_states: torch.Tensor,
        needs_score: bool,
    ) -> Tokens:
        device, batch_size = hidden_states.device, hidden_states.shape[0]
        if self.query_tokens == "selected":
            gate = logits.sigmoid()
        elif self.training:
            # A key's score rises with its margin over the threshold: the routers' gradient. Hard selection has none,
            # and is what evaluation uses. Tokens selected in any case have no margin to speak of.
            gate = F.logsigmoid(logits - state.thresholds.get(self.layer_idx, self.router.threshold))
            if self.router.include_first:
                gate = gate.masked_fill(state.first.to(device)[..., None], 0.0)
        else:
            gate = None
        position, valid, segment = (
            None if x is None else x.to(device) for x in (state.position, state.valid, state.segment)
        )
        cos, sin = (x.to(device).expand(batch_size, -1, -1) for x in position_embeddings)
        score = None
        if needs_score:
            # Rounded: a repeated token has the same logit, and float32's last bits, which differ between a prefill and
            # a single step, must not decide which of the two is evicted.
            score = logits.detach().bfloat16().float()
            if self.router.include_first:
                score = score.masked_fill(state.first.to(device)[..., None], torch.inf)
        return Tokens(position, valid, segment, cos, sin, selected, gate, score)

    def _evictions(self, tokens: Tokens) -> torch.Tensor | None:
        """`[B, T, G]`: when the budget evicts the tokens of a call without a cache."""
        selected, score = tokens.selected.transpose(1, 2), tokens.score.transpose(1, 2)
        segment = None if tokens.segment is None else tokens.segment[:, None]
        until = evicted_at(score, tokens.position[:, None].expand_as(selected), selected, self.budget, segment)
        return None if until is None else until.transpose(1, 2)

    def _selected(
        self, hidden_states: torch.Tensor, tokens: Tokens, cache: SparseKeyValues | FixedSparseKeyValues | None
    ) -> torch.Tensor:
        """Form "selected": outputs for the selected tokens alone."""
        weights = HeadWeights(
            self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.q_bias, self.k_bias, self.v_bias
        )
        if cache is None:
            return self._kernels(hidden_states, cache).selected_heads(hidden_states, weights, tokens)[0]
        if isinstance(cache, FixedSparseKeyValues):
            return self._selected_fixed(hidden_states, weights, tokens, cache)
        groups = None
        if cache.kept.count is not None:
            # Groups that select nothing cost nothing: neither their weights nor their cache are read.
            groups = tokens.selected.any(dim=1).any(dim=0).nonzero()[:, 0]
            if len(groups) == 0:
                return torch.zeros_like(hidden_states)
            if len(groups) == self.num_groups:
                groups = None
            else:
                weights = HeadWeights(*(None if weight is None else weight[groups] for weight in weights))
                score = None if tokens.score is None else tokens.score[..., groups]
                tokens = tokens._replace(
                    selected=tokens.selected[..., groups], gate=tokens.gate[..., groups], score=score
                )
        past, tokens = cache.read_selected(tokens, groups)
        output, new = backend(hidden_states).selected_heads(hidden_states, weights, tokens, past)
        cache.append_selected(new, groups)
        return output

    def _selected_fixed(
        self, hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, cache: FixedSparseKeyValues
    ) -> torch.Tensor:
        """Form "selected" on a static cache."""
        if hidden_states.shape[1] == 1:
            score = tokens.score.masked_fill(~tokens.selected, -torch.inf)
            output = backend(hidden_states).decode_selected(
                hidden_states[:, 0],
                weights,
                tokens.cos[:, 0],
                tokens.sin[:, 0],
                score[:, 0],
                tokens.gate[:, 0],
                cache.valid if cache.valid is None else cache.valid[:, 0],
                cache.state,
                cache.budget,
            )
            return output[:, None]
        past, tokens = cache.read_selected(tokens)
        output, new = self._kernels(hidden_states, cache).selected_heads(hidden_states, weights, tokens, past)
        cache.append_selected(past, new, hidden_states.shape[1])
        return output

    def _all(
        self, hidden_states: torch.Tensor, tokens: Tokens, cache: SparseKeyValues | FixedSparseKeyValues | None
    ) -> torch.Tensor:
        """Form "all": every token queries."""
        query, key, value = (
            F.linear(hidden_states, weight.flatten(0, 1), None if bias is None else bias.flatten())
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            for weight, bias in (
                (self.q_proj, self.q_bias),
                (self.k_proj, self.k_bias),
                (self.v_proj, self.v_bias),
            )
        )
        cos, sin = tokens.cos[:, None], tokens.sin[:, None]
        query = rotate(query, cos, sin).unflatten(1, (self.num_groups, -1))  # [B, G, R, T, d]
        key = rotate(key, cos, sin)  # [B, G, T, d]
        if isinstance(cache, FixedSparseKeyValues) and key.shape[2] == 1:
            score = tokens.score.masked_fill(~tokens.selected, -torch.inf)
            heads = backend(query).decode_all(
                query[:, :, :, 0],
                key[:, :, 0],
                value[:, :, 0],
                score[:, 0],
                cache.valid if cache.valid is None else cache.valid[:, 0],
                cache.state,
                cache.budget,
            )[:, :, :, None]  # [B, G, R, T, d]
        else:
            heads = self._attend(query, key, value, tokens, cache)
        heads = heads.permute(1, 0, 3, 2, 4).flatten(3)  # [G, B, T, R * d]
        if heads[0, ..., 0].numel() < heads.shape[-1]:
            # A few tokens, as in decoding: einsum would copy W_O to bring the groups together, which costs more than
            # to add the groups' outputs up.
            return torch.matmul(heads.flatten(1, 2), self.o_proj.transpose(1, 2)).sum(0).view_as(hidden_states)
        return torch.einsum("gbth,gnh->btn", heads, self.o_proj)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: Tokens,
        cache: SparseKeyValues | FixedSparseKeyValues | None,
    ) -> torch.Tensor:
        """Form "all": attention of `query` [B, G, R, T, d] to the cache and the call's `key`, `value` [B, G, T, d]."""
        if cache is not None:
            near, kept = cache.update(key, value, tokens)
        else:
            selected = tokens.selected.transpose(1, 2)  # [B, G, T]
            position = tokens.position[:, None].expand_as(selected)
            valid = None if tokens.valid is None else tokens.valid[:, None].expand_as(selected)
            until = None if tokens.until is None else tokens.until.transpose(1, 2)
            near, kept = KeyValues(key, value, position, valid, selected, until), None
        far_bias = None
        if tokens.gate is not None:
            # Keys cached by earlier calls are read without a bias: no gradient could reach their routers.
            far_bias = F.pad(tokens.gate.transpose(1, 2), (near.key.shape[2] - key.shape[2], 0))
        heads = self._kernels(query, cache).all_attention(
            query, near, kept, tokens, self.window, far_bias
        )  # [B, G, R, T, d]
        if far_bias is not None:
            # A call no longer than the window reads no far key: keep the router in the graph, as DDP needs.
            heads = heads + 0.0 * far_bias.sum()
        return heads

    def _kernels(self, states: torch.Tensor, cache: SparseKeyValues | FixedSparseKeyValues | None) -> ModuleType:
        """Where `selected_heads` and `all_attention` come from."""
        kernels = backend(states)
        if kernels is portable and torch.compiler.is_compiling() and not isinstance(cache, SparseKeyValues):
            # Every shape has to be known. With a cache, the specification's are.
            return compiled if cache is None else reference
        return kernels

    def cache_spec(self) -> SparseSpec:
        """What a cache has to know of these heads."""
        sparsity, has_dense_heads = self.router.sparsity, self.has_dense_heads
        return SparseSpec(self.window, self.budget, sparsity, self.num_groups, self.head_dim, has_dense_heads)


def _permute(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the tokens of `states` [B, T, ...] by `order` [B, T]."""
    return states[torch.arange(len(order), device=order.device)[:, None], order]
