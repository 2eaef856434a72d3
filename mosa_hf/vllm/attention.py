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
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from ..modeling.router import MosaRouter
from ..routing import select_by_threshold
from .arena import ARENA, Arena, ArenaBackend, Chunk, DecodeStep, Group, TokenStates
from .prefill import Options, read_chunk
from .spec import ArenaSpec


@dataclass
class ArenaMetadata:
    """Of one step."""

    decode: DecodeStep | None
    chunks: list[Chunk]
    num_tokens: int


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
        return ArenaMetadata(decode, chunks, start[-1])

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> ArenaMetadata:
        return ArenaMetadata(None, [], 0)  # of no request


class ArenaLayerBackend(ArenaBackend):
    @staticmethod
    def get_builder_cls() -> type[ArenaMetadataBuilder]:
        return ArenaMetadataBuilder


class SparseAttention(nn.Module):
    """
    In the place of vLLM's `Attention`, with its call. `route` comes first, with what the attention module was given.

    Args:
        attention: vLLM's.
        groups: what each key/value head of this worker is.
        columns: of the sparse ones among them, by index, the router's column.
        layer: its index.
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
    ):
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.num_kv_heads: int = attention.num_kv_heads
        self.head_size: int = attention.head_size
        self.impl: Any = attention.impl  # how vLLM's would score
        self.layer = layer
        self.register_buffer("column", torch.tensor(list(columns.values()), dtype=torch.int64), persistent=False)
        self.register_buffer("group", torch.tensor(list(columns), dtype=torch.int64), persistent=False)
        always = torch.tensor([not each.is_sliding for each in groups])
        always[list(columns)] = False
        self.register_buffer("always", always, persistent=False)
        self.selected: torch.Tensor | None = None
        self.score: torch.Tensor | None = None

    def options(self) -> Options:
        """How the layer scores."""
        sinks = getattr(self.impl, "sinks", None)
        if sinks is not None:
            sinks = sinks.detach().float().view(self.num_kv_heads, -1)
        return Options(self.impl.scale, getattr(self.impl, "logits_soft_cap", None) or None, sinks)

    def route(self, router: MosaRouter | None, positions: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """
        Decide what each group selects of `hidden_states` [T, D] at `positions` [T].

        Args:
            router: None where no group of the layer is sparse.
        """
        selected = self.always.expand(hidden_states.shape[0], -1)
        score = hidden_states.new_zeros(selected.shape, dtype=torch.float32)
        if router is not None:
            logits = router.logits(hidden_states)
            first = positions == 0 if router.include_first else None
            chosen = select_by_threshold(
                logits[None], router.all_kept(router.threshold), None, None if first is None else first[None]
            )[0]
            rank = router.score(logits, first)
            selected = selected.index_copy(1, self.group, chosen.index_select(1, self.column))
            score = score.index_copy(1, self.group, rank.index_select(1, self.column))
        self.selected, self.score = selected, score

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query = query.reshape(-1, self.num_heads, self.head_size).contiguous()
        key, value = (states.reshape(-1, self.num_kv_heads, self.head_size).contiguous() for states in (key, value))
        output = torch.empty_like(query)
        torch.ops.vllm.mosa_attention(query, key, value, self.selected, self.score, output, self.layer, ARENA)
        return output.flatten(1)


class ArenaLayer(Arena, AttentionLayerBase):
    """An arena as the one layer with a cache that vLLM sees of a converted model."""

    attentions: list[SparseAttention]  # of every layer

    def get_attn_backend(self) -> type[ArenaLayerBackend]:
        return ArenaLayerBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ArenaSpec:
        return self.spec

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        self.kv_cache = kv_cache
        self.bind(kv_cache)


def mosa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selected: torch.Tensor,
    score: torch.Tensor,
    output: torch.Tensor,
    layer: int,
    arena_name: str,
) -> None:
    """
    One layer of a step.

    Args:
        query, output: `[T, G * R, d]`.
        key, value: `[T, G, d]`.
        selected, score: `[T, G]`.
    """
    context = get_forward_context()
    arena: ArenaLayer = context.no_compile_layers[arena_name]
    if context.attn_metadata is None or arena.pages is None:  # vLLM measures or warms up
        output.zero_()
        return
    metadata: ArenaMetadata = context.attn_metadata[arena_name]
    if metadata.num_tokens < len(output):  # padding
        output[metadata.num_tokens :] = 0
    options, tokens = arena.attentions[layer].options(), TokenStates(query, key, value, selected, score)
    for chunk in metadata.chunks:
        output[chunk.tokens] = read_chunk(arena, layer, chunk, tokens.of(chunk.tokens), options)
    if (step := metadata.decode) is not None:
        own = slice(metadata.num_tokens) if step.token is None else step.token
        output[own] = read_token(arena, layer, step, tokens.of(own), options)


def read_token(arena: Arena, layer: int, step: DecodeStep, tokens: TokenStates, options: Options) -> torch.Tensor:
    """One layer reads one token of each of B requests. Returns `[B, G * R, d]`."""
    assert arena.pages is not None
    query, key, value, selected, _ = tokens
    batch_size, num_groups = selected.shape
    arena.ring_selected[layer, step.row[:, None], arena.groups, step.at[layer]] = selected
    arena.pages.write(key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None], step.entry[layer])
    length = step.length[layer]
    table = arena.table[layer, :, :, : step.num_blocks].index_select(0, step.row)
    heads = query.view(batch_size, num_groups, -1, query.shape[-1])
    if arena.reads_itself[layer]:
        output = arena.pages.attend(heads, length, table, options.scale, options.softcap, options.sinks)
    else:
        # With a window of 0, a token that is not selected does not read itself: its slot is the last one.
        length = length - (arena.window_is_0[layer] & ~selected).int()
        output = arena.pages.attend(
            heads, length.clamp(min=1), table, options.scale, options.softcap, options.sinks
        ).masked_fill((length == 0)[..., None, None], 0.0)
    return output.view(query.shape)


def _mosa_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selected: torch.Tensor,
    score: torch.Tensor,
    output: torch.Tensor,
    layer: int,
    arena_name: str,
) -> None:
    return


direct_register_custom_op("mosa_attention", mosa_attention, ["output"], _mosa_attention_fake)
