"""What the demo and the real-model tests measure: perplexity, cache bytes, decoding speed, and the baseline."""

import time
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf import GroupPlan, to_dense, trace_routing
from mosa_hf.compat import CACHE
from mosa_hf.conversion import calibration_windows, default_text
from mosa_hf.conversion.windows import NUM_WINDOWS, WINDOW_LENGTH
from mosa_hf.evaluation import decoding_bytes, filled_cache
from mosa_hf.modeling.configuration import SparseGroupsConfig
from mosa_hf.modeling.group_plan import SparseGroup
from mosa_hf.modeling.kv_share import planned_bytes
from mosa_hf.modeling.sparse_models import with_sparse_groups


def calibration(
    tokenizer: PreTrainedTokenizerBase, num_windows: int = NUM_WINDOWS, window_length: int = WINDOW_LENGTH
) -> torch.Tensor:
    """Token ids `[N, T]` of the text that `mosa-convert` takes by default."""
    return calibration_windows(tokenizer, default_text().documents, num_windows, window_length)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """exp of the mean loss over the tokens of `windows` [N, T], each window read on its own."""
    losses = [
        model(row[None], labels=row[None], use_cache=False).loss.item()
        for row in tqdm(windows, desc="Reading held-out text", unit="window", leave=False)
    ]
    return float(torch.tensor(losses).mean().exp())


def kv_bytes(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """`decoding_bytes` of the cache after reading `input_ids` [1, T]."""
    return decoding_bytes(filled_cache(model, input_ids))


class EntryCounts(NamedTuple):
    """Tokens whose keys and values the groups of a model keep, summed over layers and groups."""

    dense: int
    sparse: int


def entries(model: PreTrainedModel, input_ids: torch.Tensor) -> EntryCounts:
    """
    What a cache of `model` has to keep of `input_ids` [1, T] by definition (docs/design.md, section 4), counted from
    what the routers select: of a sparse group the window, and the selected tokens before it.
    """
    with trace_routing(model) as selected:
        filled_cache(model, input_ids)
    length = input_ids.shape[1]
    dense = sparse = 0
    for layer, groups in enumerate(GroupPlan.of_config(model.config).layers):
        kept = min(length, model.config.sliding_window) if model.config.stays_dense(layer) else length
        dense += kept * groups.count(None)
        for i, group in enumerate(group for group in groups if group is not None):
            far = torch.cat(selected[layer], dim=1)[0, : max(length - group.window, 0), i]
            sparse += min(length, group.window) + int(far.sum())
    return EntryCounts(dense, sparse)


def formula_bytes(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """
    What a cache takes by definition (docs/design.md, section 4), for `input_ids` [1, T]: 2 · dtype · d · (T · KV_dense
    + Σ groups (n_selected + window)).
    """
    return 2 * model.dtype.itemsize * sum(entries(model, input_ids)) * model.config.head_dim


@torch.inference_mode()
def decode_speed(model: PreTrainedModel, cache: Cache, token: torch.Tensor, num_tokens: int = 32) -> float:
    """Tokens per second of greedy decoding of `token` [1, 1] and what follows it, after what `cache` holds."""
    start = time.perf_counter()
    for _ in range(num_tokens):
        token = model(token, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)
    return num_tokens / (time.perf_counter() - start)


NOTHING_SELECTED = 1e6  # a sparsity: of 1, a group would keep everything whatever its threshold is


def first_token_and_window(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """The baseline of selection: the same groups keep the first token and a longer window, and select nothing."""
    base = to_dense(model)
    baseline = with_sparse_groups(base, _windows_alone(model, base, window)).eval()
    for router in baseline.mosa_routers().values():
        router.threshold.fill_(torch.inf)
    return baseline


def window_of_share(model: PreTrainedModel, share: float, num_tokens: int) -> int:
    """
    The window with which `first_token_and_window` takes a share of the original's bytes after so many tokens. Layers
    with a sliding window, and dense groups, take theirs in any case.
    """
    original, rest = planned_bytes(_windows_alone(model, to_dense(model), 1), num_tokens)
    of_a_token = (original - rest) / (num_tokens - 1)
    return max(round((share * original - rest) / of_a_token), 1)  # beside the first token


def _windows_alone(model: PreTrainedModel, base: PreTrainedModel, window: int) -> SparseGroupsConfig:
    """A config of `base` whose sparse groups, those of `model`, have a window and no more."""
    plan = GroupPlan.of_config(model.config)
    plan = plan.with_sparse(dict.fromkeys(plan.sparse_pairs(), SparseGroup(window, NOTHING_SELECTED)))
    return type(model.config).from_base(base.config, mosa_plan=plan.to_list())


def random_selection(model: PreTrainedModel) -> PreTrainedModel:
    """The baseline of routers: the same groups with the same windows select at the same rates, by chance."""
    baseline = with_sparse_groups(to_dense(model), model.config).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(router, args, output):
        logits, first = output  # no logit reaches the threshold: what is selected are first tokens
        rates = 1 / torch.tensor(router.sparsity)
        return logits, first | (torch.rand(logits.shape, generator=generator) < rates)

    for router in baseline.mosa_routers().values():
        router.threshold.fill_(torch.inf)
        router.register_forward_hook(draw)
    return baseline
