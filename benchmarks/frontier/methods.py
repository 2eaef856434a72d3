"""What the frontier compares: the original, its conversions, and baselines."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf import ConversionConfig, GroupPlan, convert_model, load_routers
from mosa_hf.conversion.allocation import candidate_plan
from mosa_hf.conversion.calibration import RouterFit, fit_routers
from mosa_hf.conversion.convert import plain_config
from mosa_hf.modeling.sparse_models import with_sparse_groups

from .. import metrics
from .tasks import Size

KEPT = (0.44, 0.25, 0.156)  # of the prompt
SELECTED = (0.355, 0.226, 0.129)  # by KVzap beyond a window of 128: about the bytes of our first three and last


@dataclass(frozen=True)
class Method:
    """
    What is measured. `name` and `parameters` tell it from all others.

    build: the model; None for baselines, which run elsewhere.
    prompt: how it reads the prompt, "sparse" or "dense".
    frees_memory: whether what it drops is gone, or only masked.
    """

    name: str
    parameters: dict[str, Any]
    build: Callable[[], PreTrainedModel] | None = None
    prompt: str = "sparse"
    frees_memory: bool = True


class Models:
    """The original, and what is made of it. Routers are fitted once, when they are first needed."""

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerBase, size: Size):
        self.directory, self.size = directory, size
        self.original = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.calibration = metrics.calibration(tokenizer, size.windows, size.window)
        self._converted: dict[ConversionConfig, PreTrainedModel] = {}

    @cached_property
    def _fits(self):
        return fits_of_all(self.original, self.calibration)

    def converted(self, conversion: ConversionConfig) -> PreTrainedModel:
        if conversion not in self._converted:
            self._converted[conversion] = convert_model(self.original, conversion, self.calibration, self._fits)
        return self._converted[conversion]

    def window_alone(self, window: int) -> PreTrainedModel:
        return metrics.first_token_and_window(
            with_sparse_groups(self.original, plain_config(self.original.config)), window
        )

    def methods(self, ours: list[str]) -> list[Method]:
        """The original, conversions of `ours`, "window/sparsity", and baselines that run here."""
        text = f"{len(self.calibration)} x {self.calibration.shape[1]}"
        methods = [Method("original", {}, lambda: self.original, prompt="dense")]
        conversions = [
            ConversionConfig(window=int(w), sparsity=float(s)) for w, s in (each.split("/") for each in ours)
        ]
        for conversion in conversions:
            parameters = {"window": conversion.window, "sparsity": conversion.sparsity, "calibration": text}
            methods.append(Method("ours", parameters, lambda conversion=conversion: self.converted(conversion)))
        if conversions:  # the rates of one of them: the default, if it is among them
            drawn = conversions[conversions.index(ConversionConfig()) if ConversionConfig() in conversions else 0]
            parameters = {"window": drawn.window, "sparsity": drawn.sparsity, "calibration": text}
            methods.append(
                Method("random selection", parameters, lambda: metrics.random_selection(self.converted(drawn)))
            )
        return methods

    def given(self, converted: list[Path], routers: list[Path], plans: list[Path]) -> list[Method]:
        """Methods of folders and plans on disk, told from others of the same name by what they hold."""
        methods = []
        for folder in converted:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            parameters = {"folder": folder.name, "routers": digest_of(model)}
            methods.append(Method("converted", parameters, lambda model=model: model))
        for folder in routers:
            model = load_routers(self.original, folder).eval()
            parameters = {"folder": folder.name, "routers": digest_of(model)}
            methods.append(Method("routers", parameters, lambda model=model: model))
        for path in plans:
            conversion = ConversionConfig(plan=GroupPlan.load(path))
            digest = hashlib.sha256(json.dumps(conversion.plan.to_list()).encode()).hexdigest()[:12]
            parameters = {"file": path.name, "plan": digest}
            methods.append(Method("plan", parameters, lambda conversion=conversion: self.converted(conversion)))
        return methods


def fits_of_all(model: PreTrainedModel, calibration: torch.Tensor) -> list[RouterFit | None]:
    """Routers of every group that can be sparse, on windows `[N, T]`: all conversions of the model may share them."""
    return fit_routers(model, calibration, candidate_plan(plain_config(model.config), ConversionConfig()))


def digest_of(model: PreTrainedModel) -> str:
    """A digest of the routers of a model with sparse groups, and of its plan."""
    digest = hashlib.sha256(json.dumps(GroupPlan.of_config(model.config).to_list()).encode())
    for router in model.mosa_routers().values():
        for tensor in router.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def kvpress_methods(all_kept: Sequence[float] = KEPT, all_selected: Sequence[float] = SELECTED) -> list[Method]:
    """Baselines that `baselines.py` knows, each with several shares that it keeps."""
    pruning = [
        Method(name, {"kept": kept}, prompt="dense")
        for name in ("StreamingLLM", "SnapKV", "TOVA", "ExpectedAttention")
        for kept in all_kept
    ]
    masking = [
        Method("KVzap", {"window": 128, "selected": selected, "step": 16}, prompt="dense", frees_memory=False)
        for selected in all_selected
    ]
    return pruning + masking
