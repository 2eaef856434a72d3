"""
8-bit entries, defined. A key, or a value, is stored as whole numbers from -127 to 127, its *codes*, and its *scale*,
the largest magnitude in it: it stands for codes · scale / 127. A scale is exact in the model's dtype, so that what has
been rounded once has the same codes again. Keys are *turned* before that, as are the queries that read them.
"""

import math
from functools import cache

import torch

from .capture import is_captured

Rows = dict[str, torch.Tensor]  # what some entries hold, by name
LARGEST = 127  # code


def turned(states: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
    """
    Queries, or keys, `[..., d]` times an orthonormal matrix, the cosine transform, which leaves their products as they
    are and spreads what one channel has over all: a scale serves the largest. Keys first lose `center` [..., d], which
    takes the same from all scores of a query.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    own = states.to(dtype) if center is None else states.to(dtype) - center
    make = _cosines if is_captured() else _held_cosines
    return (own @ make(states.shape[-1], dtype, states.device)).to(states.dtype)


def _cosines(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II), `[size, size]`."""
    place = torch.arange(size, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi / size * (place[:, None] + 0.5) * place) * math.sqrt(2 / size)
    return torch.where(place == 0, math.sqrt(1 / size), matrix).to(dtype)


@cache
def _held_cosines(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd may save it
        return _cosines(size, dtype, device)


def encode(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[..., d]` int8 and scales `[...]` of `states` [..., d], in float32 at least; that of zeros is 0."""
    scale, dtype = states.abs().amax(-1), torch.promote_types(states.dtype, torch.float32)
    if scale.requires_grad and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        scale.register_hook(_refuse)
    step = scale.detach().to(dtype)[..., None] / LARGEST
    return (states.detach() / step.masked_fill(step == 0, 1.0)).round().to(torch.int8), scale


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What `codes` [..., d] and `scale` [...] stand for, in the dtype of `scale`."""
    step = scale.to(torch.promote_types(scale.dtype, torch.float32))[..., None] / LARGEST
    return (codes * step).to(scale.dtype)


def rounded(states: torch.Tensor) -> torch.Tensor:
    """What the codes of `states` [..., d] stand for; gradients pass as if it were `states`."""
    exact = decode(*encode(states.detach()))
    return exact + (states - states.detach()) if torch.is_grad_enabled() else exact


def encoded(rows: Rows) -> Rows:
    """`rows` whose keys and values are codes, with their scales beside them."""
    (key, key_scale), (value, value_scale) = encode(rows["key"]), encode(rows["value"])
    return rows | {"key": key, "value": value, "key_scale": key_scale, "value_scale": value_scale}


def decoded(rows: Rows) -> Rows:
    """`rows` as they were before `encoded`, but rounded; the same if they are not encoded."""
    if "key_scale" not in rows:
        return rows
    own = {name: decode(rows[name], rows[f"{name}_scale"]) for name in ("key", "value")}
    return {name: states for name, states in rows.items() if not name.endswith("_scale")} | own


def _refuse(grad: torch.Tensor) -> None:
    raise RuntimeError(
        "No gradient reaches entries that an earlier call has stored as codes (`mosa_cache_dtype`): let one call read "
        "the whole sequence, read what is not trained under `torch.no_grad()`, or set `mosa_cache_dtype=None`."
    )
