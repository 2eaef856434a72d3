"""
What every decoder type has to hold with sparse groups, on a tiny model, each beside the stock model: `check_decoder`
gives the findings of one type, `testing.families` those of all.
"""

import copy
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from mosa_hf import ConversionConfig, convert_checkpoint, convert_model
from mosa_hf.compat import CACHE
from mosa_hf.modeling.family import family_of
from mosa_hf.modeling.layers import attention_modules, decoder_of
from mosa_hf.modeling.sparse_groups import SparseGroupsMixin

from .decoders import is_wrapper, tiny_decoder
from .tiny import with_random_routers

NUM_TOKENS, WINDOW, SPARSITY = 24, 4, 4
TOLERANCE = 1e-4  # relative to the largest logit; or three times what upstream itself differs by
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WRAPPER = "It is a model around a language model, which is converted within it."
CHECKS = ("original", "cached", "steps", "generate", "saved", "files", "padding", "calibrated")


@dataclass(frozen=True)
class Findings:
    """What `check_decoder` found of a type."""

    model_type: str
    reason: str | None = None  # why it is refused
    layers: tuple[int, int] = (0, 0)  # with sparse groups, of so many
    failed: dict[str, str] = field(default_factory=dict)  # check → what was wrong

    @property
    def passes(self) -> bool:
        return self.reason is None and not self.failed


def tokens(num_rows: int = 1, num_tokens: int = NUM_TOKENS, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 200, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(input_ids=ids, **{"use_cache": False} | options).logits


def in_steps(model: PreTrainedModel, ids: torch.Tensor, first: int = 10) -> torch.Tensor:
    """The logits of a text whose first tokens are read at once, and the others one by one."""
    cache: dict[str, Any] = {CACHE: DynamicCache(config=model.config), "use_cache": True}
    parts = [logits_of(model, ids[:, :first], **cache)]
    parts += [logits_of(model, ids[:, i : i + 1], **cache) for i in range(first, ids.shape[1])]
    return torch.cat(parts, dim=1)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


def check_decoder(model_type: str) -> Findings:
    """
    Convert a tiny model of a type and compare it with the original, and with itself in other modes.

    Raises:
        Exception: what building the tiny stock model raises.
    """
    if is_wrapper(model_type):
        return Findings(model_type, reason=WRAPPER)
    try:
        family_of(model_type)
    except ValueError as error:
        return Findings(model_type, reason=str(error))
    model = tiny_decoder(model_type)
    ids = tokens()
    stock = logits_of(model, ids)
    try:
        same = convert_model(model, ConversionConfig(sparsity=1, window=WINDOW))
    except ValueError as error:
        return Findings(model_type, reason=str(error))
    decoder = decoder_of(same)
    layers = len(attention_modules(decoder, SparseGroupsMixin)), model.config.num_hidden_layers
    failed: dict[str, str] = {}

    def check(name: str, found: float, of_stock: float = 0.0) -> None:
        if not found <= max(TOLERANCE, 3 * of_stock):
            failed[name] = f"differs by {found:.1e}" + (f" (upstream by {of_stock:.1e})" if of_stock else "")

    stock_steps = in_steps(model, ids)
    check("original", difference(logits_of(same, ids), stock))
    check("cached", difference(in_steps(same, ids), stock_steps))
    sparse = sparse_model(model)
    full = logits_of(sparse, ids)
    if difference(full, stock) < 1e-3:
        failed["steps"] = "selects everything"
    check("steps", difference(in_steps(sparse, ids), full), difference(stock_steps, stock))
    if not torch.equal(*(sparse.generate(ids[:, :12], use_cache=cached, **GREEDY) for cached in (True, False))):
        failed["generate"] = "differs with a cache"
    if problem := _reloaded(sparse, ids, full):
        failed["saved"] = problem
    if problem := _converted_files(model, ids, stock):
        failed["files"] = problem
    check("padding", _padded(sparse, ids, full), _padded(model, ids, stock))
    calibrated = convert_model(model, ConversionConfig(sparsity=SPARSITY, window=WINDOW), tokens(2, 40))
    check(
        "calibrated",
        difference(in_steps(calibrated, ids), logits_of(calibrated, ids)),
        difference(stock_steps, stock),
    )
    return Findings(model_type, None, layers, failed)


def sparse_model(model: PreTrainedModel) -> PreTrainedModel:
    """With routers of random weights."""
    fields = {"mosa_sparsity": SPARSITY, "mosa_window": WINDOW, "mosa_gate_slope": 0.0}
    return with_random_routers(model, **fields)


def _reloaded(model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What is wrong with a model once it was saved and loaded."""
    with tempfile.TemporaryDirectory() as directory:
        copy.deepcopy(model).save_pretrained(directory)
        loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    if type(loaded) is not type(model):
        return f"is loaded as {type(loaded).__name__}"
    if wrong := [kind for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]:
        return f"is loaded with {wrong[0]}: {sorted(info[wrong[0]])[:2]}"
    found = difference(logits_of(loaded.eval(), ids), expected)
    return None if found < 1e-5 else f"differs by {found:.1e}"


def _converted_files(model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What is wrong with a conversion of a model's files, at ρ = 1."""
    with tempfile.TemporaryDirectory() as directory:
        copy.deepcopy(model).save_pretrained(f"{directory}/base")
        try:
            convert_checkpoint(
                f"{directory}/base", f"{directory}/converted", ConversionConfig(sparsity=1, window=WINDOW)
            )
        except ValueError as error:
            return f"is refused: {error}"
        loaded = AutoModelForCausalLM.from_pretrained(f"{directory}/converted")
    found = difference(logits_of(loaded.eval(), ids), expected)
    return None if found < TOLERANCE else f"differs by {found:.1e}"


def _padded(model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """How much a text differs by that stands, padded on the left, beside a longer one."""
    num_padding = 5
    rows = torch.cat([torch.nn.functional.pad(ids, (num_padding, 0)), tokens(1, ids.shape[1] + num_padding, seed=2)])
    mask = torch.ones_like(rows)
    mask[0, :num_padding] = 0
    return difference(logits_of(model, rows, attention_mask=mask)[:1, num_padding:], expected)
