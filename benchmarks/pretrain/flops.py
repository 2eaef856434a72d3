"""
Multiplications and additions of the native model, forward, as the paper counts them: a product of matrices `[n, m]`
and `[m, p]` is 2nmp, attention is its two products over the whole square of queries and keys, future ones included.
Norms, softmax, rotary embeddings and activations are left out. `torch.utils.flop_counter` counts the same.

A dense head with a window w is charged for w keys a query, which is what a kernel for windows computes; PyTorch's
attention on a CPU computes the whole square.
"""

from mosa_hf import MosaConfig
from mosa_hf.routing.selection import num_selected


def dense_head(config: MosaConfig, length: int) -> float:
    """FLOPs of one dense head with a key/value head of its own, one layer, one sequence of `length` tokens."""
    keys = length if config.sliding_window is None else min(length, config.sliding_window)
    return 8 * config.hidden_size * config.head_dim * length + 4 * config.head_dim * length * keys


def selected_head(config: MosaConfig, slots: float, squares: float | None = None) -> float:
    """
    FLOPs of one of the paper's heads without its router, one layer, one sequence.

    Args:
        slots: selected tokens; a mean over heads if they differ.
        squares: the mean of their squares; by default all heads have `slots`.
    """
    squares = slots**2 if squares is None else squares
    return 8 * config.hidden_size * config.head_dim * slots + 4 * config.head_dim * squares


def router(config: MosaConfig, length: int) -> float:
    return 2 * config.hidden_size * length


def forward(
    config: MosaConfig, length: int, slots: float | None = None, squares: float | None = None, routers: bool = True
) -> float:
    """
    FLOPs of one sequence, all layers alike, one query head a group.

    Args:
        slots, squares: see `selected_head`; by default what expert choice selects.
        routers: whether what is selected is chosen by routers, rather than by position.

    Raises:
        ValueError: for a config with layers that differ, or several query heads a group.
    """
    grouped = config.num_key_value_heads != config.num_attention_heads
    grouped = grouped or config.num_mosa_key_value_heads != config.num_mosa_heads
    if config.is_heterogeneous or grouped:
        raise ValueError("Counted are layers that are all alike, with one query head a group.")
    if slots is None:
        slots = num_selected(length, config.mosa_sparsity, config.mosa_min_tokens)
    sparse = selected_head(config, slots, squares) + (router(config, length) if routers else 0)
    layer = config.num_attention_heads * dense_head(config, length) + config.num_mosa_heads * sparse
    layer += 6 * config.hidden_size * config.intermediate_size * length
    return config.num_hidden_layers * layer + 2 * config.hidden_size * config.vocab_size * length
