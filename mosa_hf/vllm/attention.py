"""What stands in the place of vLLM's `Attention` in a converted model, and the one arena that all of them read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from ..modeling.router import MosaRouter
from ..routing import select_by_threshold
from .arena import ARENA, Arena, Chunk, DecodeStep, Group, TokenStates
from .prefill import Options, read_chunk
from .spec import BLOCK_SIZE, ArenaSpec


@dataclass
class ArenaMetadata:
    """Of one step."""

    decode: DecodeStep | None
    chunks: list[Chunk]
    num_tokens: int
    first: torch.Tensor | None  # [num_tokens] bool, first tokens of requests; None: of no request


class ArenaMetadataBuilder(AttentionMetadataBuilder[ArenaMetadata]):
    """Called once a step. Where single tokens go is decided here, for all layers at once."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.arena: Arena = vllm_config.compilation_config.static_forward_context[layer_names[0]]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ArenaMetadata:
        common, arena = common_attn_metadata, self.arena
        num_requests = common.num_reqs
        start = common.query_start_loc_cpu[: num_requests + 1].tolist()
        length = [end - begin for begin, end in zip(start, start[1:], strict=False)]
        row = arena.row_of_block[common.block_table_tensor[:num_requests, 0].long()]
        total = common.seq_lens[:num_requests].long()
        single = [i for i, num_tokens in enumerate(length) if num_tokens == 1 and not arena.has_budget]
        longest = min(common.max_seq_len, arena.max_len)
        decode = None
        if len(single) == num_requests:
            decode = arena.plan_decode(row, total - 1, None, longest)
        elif single:
            index = torch.tensor(single, device=row.device)
            token = torch.tensor([start[i] for i in single], device=row.device)
            decode = arena.plan_decode(row[index], total[index] - 1, token, longest)
        chunks = []
        if len(single) < num_requests:
            rows, totals = row.tolist(), total.tolist()
            for i in sorted(set(range(num_requests)).difference(single)):
                if length[i]:
                    chunk = Chunk(rows[i], start[i], totals[i] - length[i], length[i])
                    arena.begin_chunk(chunk)
                    chunks.append(chunk)
        first = torch.zeros(start[-1], dtype=torch.bool, device=row.device)
        first[common.query_start_loc[:num_requests].long()] = (
            total == common.query_start_loc[: num_requests + 1].diff()
        )
        return ArenaMetadata(decode, chunks, start[-1], first)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> ArenaMetadata:
        return ArenaMetadata(None, [], 0, None)  # of no request


class ArenaBackend(AttentionBackend):
    """What vLLM asks of the backend of a layer."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "MOSA_ARENA"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("An arena is read by `mosa_attention`, not by an implementation of vLLM's.")

    @staticmethod
    def get_builder_cls() -> type[ArenaMetadataBuilder]:
        return ArenaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [BLOCK_SIZE]

    @classmethod
    def supported_kv_cache_layouts(cls):
        return (KVCacheLayout.LBHNC,)


class SparseAttention(nn.Module):
    """
    In the place of vLLM's `Attention`, with its call. `route` comes first, with what the attention module was given.

    Args:
        attention: vLLM's.
        groups: what each key/value head of this worker is.
        columns: of the sparse ones among them, by index, the router's column.
        layer: its index.
        router: None where no group of the layer is sparse.
    """

    column: torch.Tensor  # of the router, for each sparse group
    group: torch.Tensor  # of this worker, that it is
    always: torch.Tensor  # [G] bool, of groups without a router: whether all tokens are selected, or none

    def __init__(
        self,
        attention: Any,
        groups: Sequence[Group],
        columns: dict[int, int],
        layer: int,
        router: MosaRouter | None,
    ):
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.num_kv_heads: int = attention.num_kv_heads
        self.head_size: int = attention.head_size
        self.impl: Any = attention.impl  # how vLLM's would score
        self.layer = layer
        self.router = router
        self.register_buffer("column", torch.tensor(list(columns.values()), dtype=torch.int64), persistent=False)
        self.register_buffer("group", torch.tensor(list(columns), dtype=torch.int64), persistent=False)
        always = torch.tensor([not each.is_sliding for each in groups])
        always[list(columns)] = False
        self.register_buffer("always", always, persistent=False)
        # Whether groups are what the router has columns for, and no more.
        each = list(range(len(groups)))
        self.is_of_router = router is not None and each == list(columns) == list(columns.values())
        self.is_of_router &= router is not None and len(router.sparsity) == len(groups)
        self.logits: torch.Tensor | None = None

    def options(self) -> Options:
        """How the layer scores."""
        sinks = getattr(self.impl, "sinks", None)
        if sinks is not None:
            sinks = sinks.detach().float().view(self.num_kv_heads, -1)
        return Options(self.impl.scale, getattr(self.impl, "logits_soft_cap", None) or None, sinks)

    def route(self, hidden_states: torch.Tensor) -> None:
        """Score `hidden_states` [T, D] for each group of the router."""
        if self.router is None:
            self.logits = hidden_states.new_empty(len(hidden_states), 0, dtype=torch.float32)
        else:
            self.logits = self.router.logits(hidden_states)

    def selected(self, logits: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
        """
        What each group of this worker selects, `[T, G]` bool.

        Args:
            logits: `[T, ...]`, of `route`.
            first: `[T]` bool, first tokens of requests; None: there are none.
        """
        if self.router is None:
            return self.always.expand(len(logits), -1)
        if not self.router.include_first:
            first = None
        chosen = select_by_threshold(
            logits[None], self.router.all_kept(self.router.threshold), None, None if first is None else first[None]
        )[0]
        return self._of_worker(chosen, self.always.expand(len(logits), -1))

    def score(self, logits: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
        """What a budget compares, `[T, G]`; arguments as above."""
        none = logits.new_zeros(len(logits), len(self.always))
        return none if self.router is None else self._of_worker(self.router.score(logits, first), none)

    def _of_worker(self, of_router: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The router's columns where this worker's groups have them, `others` [T, G] elsewhere."""
        if self.is_of_router:
            return of_router
        return others.index_copy(1, self.group, of_router.index_select(1, self.column))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query = query.reshape(-1, self.num_heads, self.head_size).contiguous()
        key, value = (states.reshape(-1, self.num_kv_heads, self.head_size).contiguous() for states in (key, value))
        output = torch.empty_like(query)
        torch.ops.vllm.mosa_attention(query, key, value, self.logits, output, self.layer, ARENA)
        return output.flatten(1)


class ArenaLayer(Arena, AttentionLayerBase):
    """An arena as the one layer with a cache that vLLM sees of a converted model."""

    attentions: list[SparseAttention]  # of every layer

    def get_attn_backend(self) -> type[ArenaBackend]:
        return ArenaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ArenaSpec:
        return self.spec

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        self.kv_cache = kv_cache
        self.bind(kv_cache)


def mosa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logits: torch.Tensor,
    output: torch.Tensor,
    layer: int,
    arena_name: str,
) -> None:
    """
    One layer of a step.

    Args:
        query, output: `[T, G * R, d]`.
        key, value: `[T, G, d]`.
        logits: `[T, ...]`, of `SparseAttention.route`.
        layer: counted from the first of the model.
        arena_name: by which vLLM finds the module that holds the arena.
    """
    context = get_forward_context()
    arena: ArenaLayer = context.no_compile_layers[arena_name]
    if context.attn_metadata is None or arena.pages is None:  # vLLM measures or warms up
        output.zero_()
        return
    metadata: ArenaMetadata = context.attn_metadata[arena_name]
    if (num_tokens := metadata.num_tokens) < len(output):  # padding
        output[num_tokens:] = 0
        query, key, value, logits, output = (each[:num_tokens] for each in (query, key, value, logits, output))
    attention, step = arena.attentions[layer], metadata.decode
    options, selected = attention.options(), attention.selected(logits, metadata.first)
    if step is not None and step.token is None:
        read_token(arena, layer, step, TokenStates(query, key, value, selected, None), options, output)
        return
    tokens = TokenStates(query, key, value, selected, attention.score(logits, metadata.first))
    for chunk in metadata.chunks:
        output[chunk.tokens] = read_chunk(arena, layer, chunk, tokens.of(chunk.tokens), options)
    if step is not None and step.token is not None:
        own = tokens.of(step.token)
        heads = torch.empty_like(own.query)
        read_token(arena, layer, step, own, options, heads)
        output[step.token] = heads


def read_token(
    arena: Arena, layer: int, step: DecodeStep, tokens: TokenStates, options: Options, output: torch.Tensor
) -> None:
    """One layer reads one token of each of B requests: `output` [B, G * R, d], like the queries."""
    assert arena.pages is not None
    query, key, value, selected, _ = tokens
    arena.ring_selected.view(-1).index_copy_(0, step.at[layer], selected.flatten())
    arena.pages.write(key.view(-1, 1, key.shape[-1]), value.view(-1, 1, value.shape[-1]), step.entry[layer])
    length, table = step.length[layer], step.table[layer]
    shape = *selected.shape, -1, query.shape[-1]
    query, output = query.view(shape), output.view(shape)
    if arena.reads_itself[layer]:
        arena.pages.attend(query, length, table, options.scale, options.softcap, options.sinks, output)
    else:
        # With a window of 0, a token that is not selected does not read itself: its slot is the last one.
        length = length - (arena.window_is_0[layer] & ~selected).int()
        arena.pages.attend(query, length.clamp(min=1), table, options.scale, options.softcap, options.sinks, output)
        output.masked_fill_((length == 0)[..., None, None], 0.0)


def _mosa_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logits: torch.Tensor,
    output: torch.Tensor,
    layer: int,
    arena_name: str,
) -> None:
    return


direct_register_custom_op("mosa_attention", mosa_attention, ["output"], _mosa_attention_fake)
