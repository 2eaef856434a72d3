"""Backend "triton": the functions of `reference`, composed of Triton kernels behind `torch.library` ops."""

from .selected_heads import selected_heads

__all__ = ["selected_heads"]
