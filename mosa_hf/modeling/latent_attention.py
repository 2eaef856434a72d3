"""
Latent attention (MLA) with a sparse group. Its heads expand keys and values of one latent a token, which is what a
cache keeps, with a rotated part of the key that all heads share: the layer has one group.

What is read is expanded when it is read. Where a cache has more to read than there are queries, the projection goes
into the queries and the output instead (it is *absorbed*), and no key or value of a single head is ever made.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from ..cache import CacheInForward
from ..kernels.entries import PackedKeyValues, Readable
from ..routing.layout import CallLayout
from .attention import LayerContext, sparse_attention, uncached

if TYPE_CHECKING:

    class FamilyLatentAttention(nn.Module):
        """What the mixin relies on: what the attention class of every such family has."""

        mosa_budget: int | None
        kv_lora_rank: int
        qk_nope_head_dim: int
        qk_rope_head_dim: int
        v_head_dim: int
        kv_b_proj: nn.Module  # from a latent to keys and values of all heads

        def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

else:
    FamilyLatentAttention = object


class LatentsInForward(CacheInForward):
    """
    As `CacheInForward`, for a layer whose one group is sparse: an entry's key is the latent and the rotated part side
    by side, `[B, 1, T, rank + rope]`, and its value, which is the latent again, has no channels of its own.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> Any:
        """The latents and rotated parts of the call's tokens, as they came: the attention function reads others."""
        super().update(*_joined(key_states, value_states), layer_idx, *args, **kwargs)
        return key_states, value_states


class LatentAttentionMixin(FamilyLatentAttention):
    """Stands before `SparseGroupsMixin` in the attention class of a family whose heads expand a latent."""

    cache_in_forward = LatentsInForward
    expands_as_known: ClassVar[bool]  # see the function of this name

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.expands_as_known = expands_as_known(cls.__bases__[-1])

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the family's forward calls: it hands the latents on to the attention function, as they are."""
        return kv_nope, k_rot

    def expanded(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, H, S, d]` of all heads, of entries `[B, 1, S, rank + rope]`: by the family's code."""
        return super().expand_kv(*entries.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1))

    def attend_latents(
        self,
        query: torch.Tensor,
        kv_nope: torch.Tensor,
        k_rot: torch.Tensor,
        mosa: LayerContext,
        window: int,
        **options,
    ) -> torch.Tensor:
        """
        What the attention function "mosa" computes in such a layer.

        Args:
            query: `[B, H, T, nope + rope]`, rotated.
            kv_nope, k_rot: `[B, 1, T, rank]` and `[B, 1, T, rope]`, of the call's tokens.
            mosa: what the mixin hands over.
            window: of the group.
            options: as `attend_expanded` takes them.

        Returns:
            `[B, T, H, d]`.
        """
        (routed,) = mosa.routed
        if mosa.cache is None:
            new = _joined(kv_nope, k_rot)
            read: Readable = (uncached(*new, routed, mosa.layout, self.mosa_budget), None)
        else:
            (read,) = mosa.cache.readable()
        is_absorbed = mosa.cache is not None and not torch.is_grad_enabled() and self.absorbing_is_cheaper(query, read)
        attend = self.attend_absorbed if is_absorbed else self.attend_expanded
        heads = attend(query, read, mosa.layout, window, mosa.gates[0], **options)
        if mosa.cache is not None:
            mosa.cache.end_call()
        return heads.transpose(1, 2).contiguous()

    def attend_expanded(
        self,
        query: torch.Tensor,
        read: Readable,
        layout: CallLayout,
        window: int,
        gate: torch.Tensor | None,
        *,
        sinks: torch.Tensor | None = None,
        **options,
    ) -> torch.Tensor:
        """
        Expands what is read; each head has keys and values of its own. This is the specification, and what trains.

        Args:
            query: `[B, H, T, nope + rope]`, rotated.
            read, layout, window: as in `sparse_attention`, of the one group.
            gate: `[B, T, 1]`, as there.
            sinks: `[H]`.
            options: scale and softcap, as there.

        Returns:
            `[B, H, T, d]`.
        """
        num_heads = query.shape[1]
        if isinstance(read, PackedKeyValues):
            of_heads: Readable = self._expanded_memory(read, num_heads)
        else:
            recent, cached = read
            shared: dict[str, Any] = {
                name: None if states is None else states.expand(-1, num_heads, -1)
                for name, states in recent._asdict().items()
                if name in ("position", "valid", "selected", "evicted_at", "score")
            }
            key, value = self.expanded(recent.key)
            recent = recent._replace(key=key, value=value, **shared)
            of_heads = recent, None if cached is None else self._expanded_memory(cached, num_heads)
        gate = None if gate is None else gate.expand(-1, -1, num_heads)
        sinks = None if sinks is None else sinks[:, None]
        return sparse_attention(query[:, :, None], of_heads, layout, window, gate, sinks=sinks, **options)[:, :, 0]

    def _expanded_memory(self, packed: PackedKeyValues, num_heads: int) -> PackedKeyValues:
        """The entries of a cache, head by head: as many ranges `[B, H]`, of one length, for each that was one."""
        latents, _, _ = packed.padded_view()  # row by row: adapters may differ from one to the next
        key, value = (states.flatten(0, 2) for states in self.expanded(latents[:, None]))
        evicted_at, (num_rows, stride) = packed.evicted_at, latents.shape[:2]
        if evicted_at is not None:
            evicted_at = evicted_at[packed.slots()[0]].expand(-1, num_heads, -1).flatten()
        start = stride * torch.arange(num_rows * num_heads, device=key.device).view(num_rows, num_heads)
        length = packed.length.expand(-1, num_heads)
        return PackedKeyValues(key, value, start, length, stride, stride, evicted_at=evicted_at)

    def attend_absorbed(
        self,
        query: torch.Tensor,
        read: Readable,
        layout: CallLayout,
        window: int,
        gate: torch.Tensor | None,
        *,
        sinks: torch.Tensor | None = None,
        **options,
    ) -> torch.Tensor:
        """Same function as `attend_expanded`; all heads read the latents, which nothing expands."""
        rank, nope = self.kv_lora_rank, self.qk_nope_head_dim
        weight = self._projection(query).unflatten(0, (query.shape[1], -1))
        up_key, up_value = weight.split([nope, self.v_head_dim], dim=1)
        query, rotated = query.split([nope, self.qk_rope_head_dim], dim=-1)
        query = torch.cat((_by_head(query, up_key), rotated), dim=-1)
        # Values are the first channels of keys. With all channels that keys have, every kernel takes them as they lie.
        if isinstance(read, PackedKeyValues):
            read = _with_keys_as_values(read)
        else:
            recent, cached = read
            recent = recent._replace(value=recent.key)
            read = recent, None if cached is None else _with_keys_as_values(cached)
        sinks = None if sinks is None else sinks[None]
        latents = sparse_attention(query[:, None], read, layout, window, gate, sinks=sinks, **options)
        return _by_head(latents[:, 0, ..., :rank], up_value.transpose(1, 2))

    def _projection(self, like: torch.Tensor) -> torch.Tensor:
        """
        The weight `[H * (nope + v), rank]` of the projection from a latent, as it is now: whoever trains, merges or
        exchanges it need not tell. A projection that is more than its weight is asked, on the device and in the dtype
        of `like`.
        """
        if is_plain(self.kv_b_proj):
            return cast(nn.Linear, self.kv_b_proj).weight
        return self.kv_b_proj(torch.eye(self.kv_lora_rank, dtype=like.dtype, device=like.device)).T

    def absorbing_is_cheaper(self, query: torch.Tensor, read: Readable) -> bool:
        """Whether `attend_absorbed` can compute this, and in fewer multiplications than `attend_expanded`."""
        if not self.expands_as_known or not is_linear(self.kv_b_proj):
            return False
        num_rows, _, num_queries, _ = query.shape
        if isinstance(read, PackedKeyValues):
            num_read = read.max_length
        else:
            num_read = read[0].key.shape[2] + (0 if read[1] is None else read[1].max_length)
        up = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)  # of one token's key and value
        # Of a row and head.
        expanded = num_read * (up + num_queries * (query.shape[-1] + self.v_head_dim))
        absorbed = num_queries * (up + num_read * 2 * (self.kv_lora_rank + self.qk_rope_head_dim))
        if not is_plain(self.kv_b_proj):
            absorbed += self.kv_lora_rank * up // num_rows
        return absorbed < expanded


def expands_as_known(attention_class: type[nn.Module]) -> bool:
    """
    Whether the `expand_kv` of a class is what `attend_absorbed` takes it for: `kv_b_proj` makes of a latent the keys
    and values of the heads, head by head, and all keys end in the rotated part. Its code is run on small numbers.
    """
    rank, nope, rope, size, num_heads = 2, 3, 2, 4, 2
    weight = torch.arange(1.0, num_heads * (nope + size) * rank + 1, device="cpu").view(-1, rank)
    sizes = {"kv_lora_rank": rank, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": size}
    module = SimpleNamespace(
        **sizes, num_heads=num_heads, kv_b_proj=lambda states: nn.functional.linear(states, weight)
    )
    latents = torch.arange(1.0, 7, device="cpu").view(1, 1, 3, rank)
    rotated = torch.arange(11.0, 17, device="cpu").view(1, 1, 3, rope)
    try:
        key, value = cast(Any, attention_class).expand_kv(module, latents, rotated)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False  # it reads more of its module than this
    heads = nn.functional.linear(latents, weight).unflatten(-1, (num_heads, -1)).squeeze(1).transpose(1, 2)
    expected = torch.cat((heads[..., :nope], rotated.expand(-1, num_heads, -1, -1)), dim=-1)
    return torch.equal(key, expected) and torch.equal(value, heads[..., nope:])


def is_plain(projection: nn.Module) -> bool:
    """Whether a projection does no more than to multiply by its weight: no adapter, quantisation, hook or shard."""
    return (
        isinstance(projection, nn.Linear)
        and type(projection).forward is nn.Linear.forward
        and "forward" not in vars(projection)
        and not projection._forward_pre_hooks
        and not projection._forward_hooks
        and projection.bias is None
        and not hasattr(projection.weight, "__tensor_flatten__")
    )


def is_linear(projection: nn.Module) -> bool:
    """Whether what a projection makes of unit vectors is all of it: not known of adapters around one."""
    return next(projection.children(), None) is None and getattr(projection, "bias", None) is None


def _joined(kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of entries, see `LatentsInForward`."""
    return torch.cat((kv_nope, k_rot), dim=-1), kv_nope[..., :0]


def _with_keys_as_values(packed: PackedKeyValues) -> PackedKeyValues:
    parts = packed.parts and [(key, key) for key, _ in packed.parts]
    return packed._replace(value=packed.key, parts=parts)


def _by_head(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`states` [B, H, T, a] times the `weight` [H, a, b] of each head, without a copy of it for each row."""
    rows = states.transpose(0, 1)  # [H, B, T, a]
    return (rows.flatten(1, 2) @ weight).unflatten(1, rows.shape[1:3]).transpose(0, 1)
