"""Backend "triton": the functions of `reference`, composed of Triton kernels behind `torch.library` ops."""

from .all_attention import all_attention
from .decode import decode_all
from .selected_decode import decode_selected
from .selected_heads import selected_heads

__all__ = ["all_attention", "decode_all", "decode_selected", "selected_heads"]
