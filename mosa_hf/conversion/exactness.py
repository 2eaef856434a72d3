"""
Whether sparse groups compute what a model's own attention does: where every token is selected, the converted model is
the original. Some families do more in their attention than its code tells, so each conversion asks on a few tokens.
"""

from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from ..compat import CACHE, exact_attention
from ..modeling.configuration import SparseGroupsConfig
from ..modeling.devices import input_device
from ..modeling.group_plan import GroupPlan, SparseGroup
from ..modeling.layers import decoder_of
from ..modeling.modes import evaluating
from ..modeling.sparse_models import with_sparse_groups

NUM_TOKENS = 24  # of which the last are fed one by one to a cache
NUM_SINGLE = 4
WINDOW = 4  # so that most keys are read because they are selected
# Of the norm of a token's hidden state, how far off most tokens may be. In half precision another order of additions
# shows, and lets experts change places now and then.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 0.1


def check_computes_the_same(model: PreTrainedModel, plan: GroupPlan, config_class: type[SparseGroupsConfig]) -> None:
    """
    Args:
        model: the original, of a family in `families`.
        plan: of the groups that are to become sparse.
        config_class: of the converted model.

    Raises:
        ValueError: if the groups of `plan`, with every token selected, compute something else than the original, with
            a cache or without one, or fail; if the original itself leaves out what its config asks for.
    """
    if model.device.type == "meta" and not hasattr(model, "hf_device_map"):  # it has no weights to compute with
        return
    if model.config._attn_implementation == "sdpa" and exact_attention(type(model)):
        raise ValueError(
            f'This version of Transformers leaves the softcap of {type(model).__name__} out under "sdpa" attention: '
            'load the model with `attn_implementation="eager"`.'
        )
    everything = plan.with_sparse(dict.fromkeys(plan.sparse(), SparseGroup(WINDOW, 1)))
    config = config_class.from_base(model.config, mosa_plan=everything.to_list(), mosa_gate_slope=0.0)
    vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, NUM_TOKENS), generator=generator).to(input_device(model))
    with evaluating(model), torch.no_grad():
        try:
            expected = _hidden_states(model, ids)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot have sparse groups: the model itself does not run on a few tokens and "
                f"a `DynamicCache` ({type(error).__name__}: {error})"
            ) from error
        try:
            found = _hidden_states(with_sparse_groups(model, config).eval(), ids)
        except Exception as error:  # whatever a family's code raises on what it does not expect
            raise ValueError(
                f"{type(model).__name__} cannot have sparse groups: its attention does not work with them "
                f"({type(error).__name__}: {error})"
            ) from error
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    tolerance = HALF_TOLERANCE if is_quantized else TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    if not (worst := errors.quantile(0.9).item()) <= tolerance:
        raise ValueError(
            f"{type(model).__name__} cannot have sparse groups: with every token selected, its hidden states differ "
            f"by {worst:.1e} of their size (at most {tolerance:.0e}), so that its attention computes something that "
            "sparse groups do not know of."
        )


def _hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """`[2, T, D]` float32 or float64 of a text `[1, T]`, read at once, and with a cache to the end one by one."""
    decoder = decoder_of(model)
    cache: dict[str, Any] = {CACHE: DynamicCache(config=model.config), "use_cache": True}
    whole = decoder(input_ids=ids, use_cache=False).last_hidden_state
    first = ids.shape[1] - NUM_SINGLE
    parts = [decoder(input_ids=ids[:, :first], **cache).last_hidden_state]
    parts += [decoder(input_ids=ids[:, i : i + 1], **cache).last_hidden_state for i in range(first, ids.shape[1])]
    states = torch.cat([whole, torch.cat(parts, dim=1).to(whole.device)])
    return states if states.dtype == torch.float64 else states.float()
