"""Backend "triton": the functions of `reference`, composed of Triton kernels behind `torch.library` ops."""

from .all_attention import all_attention
from .selected_heads import selected_heads

__all__ = ["all_attention", "selected_heads"]
