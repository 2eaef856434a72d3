"""Which heads Triton's kernels take."""

TRITON_HEAD_DIM = 256  # up to which blocks of keys and values fit into a GPU's shared memory


def check_head_dim(head_dim: int) -> None:
    """Raise a ValueError for heads that Triton's kernels do not take."""
    if head_dim > TRITON_HEAD_DIM:
        raise ValueError(f"`head_dim` {head_dim} is more than {TRITON_HEAD_DIM}: choose `use_backend('torch')`.")
