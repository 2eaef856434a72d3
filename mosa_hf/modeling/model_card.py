"""Model cards: what the Hub and its visitors should know of a model with sparse groups, or of routers alone."""

import json
import re
import shlex
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCardData
from transformers.modeling_utils import PreTrainedModel

from .configuration import SparseGroupsConfig
from .group_plan import GroupPlan
from .kv_share import planned_bytes
from .remote_code import InstalledCodeConfigMixin

# By the end of a class' name.
PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "image-text-to-text",
}
SEVERAL_TASKS = ("AutoModelForMultimodalLM", "AutoModelForPreTraining")
LENGTHS = (4096, 32768)  # of caches whose bytes are named
PLACE = "path of this folder"

LOSSES = "## What it loses\n"
CARD = """---
{front_matter}
---

# {title}

{what} for [MoSA](https://arxiv.org/abs/2505.00315) sparse attention: {groups} of {all_groups} key/value groups keep
the tokens that their routers select, and the last few, instead of all.

```python
import mosa_hf  # pip install mosa-hf
{code}
```

## Plan

{plan}

{losses}
Not measured here. `{measure}`
compares it with its original on your texts, and with `--card` writes the result here.

## Calibration

{calibration}
"""

HEALED = """
## Healing

{healing}
"""


def model_card(
    config: SparseGroupsConfig,
    model_class: type[PreTrainedModel],
    base_model: str,
    *,
    is_routers: bool,
    has_adapter: bool = False,
    place: str | None = None,
) -> str:
    """
    The text of a README.md.

    Args:
        config: of the model; what its conversion recorded of base and text is named.
        model_class: of the model; around a decoder, or that alone.
        base_model: name of the base model; empty if unknown.
        is_routers: whether the folder has routers alone, not the model.
        has_adapter: whether there is one of PEFT beside the routers.
        place: name on the Hub that the folder will have; None: it is a folder.
    """
    groups, name = GroupPlan.of_config(config), Path(base_model).name
    what = ("Routers and an adapter" if has_adapter else "Routers") if is_routers else "Model"
    base, place = base_model or "the base model", place or PLACE
    auto, class_name = auto_class_name(model_class), model_class.__name__
    in_python = [json.dumps(each, ensure_ascii=False) for each in (base, place)]
    arguments = f"{in_python[0]}, routers={in_python[1]}" if is_routers else in_python[1]
    typed = [base, "--routers", place] if is_routers else [place]
    code = f"model = mosa_hf.{class_name}.from_pretrained({arguments})"
    if has_adapter:
        code = f"from peft import PeftModel\n\n{code}\nmodel = PeftModel.from_pretrained(model, {in_python[1]})"
    elif not is_routers:
        code = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({arguments})"
    healing = healing_in_short(config)
    card = CARD.format(
        front_matter=_front_matter(config, class_name, base_model, is_routers).to_yaml(),
        title=f"{what}: {name} with sparse attention" if name else what,
        what=what,
        losses=LOSSES,
        groups=len(groups.sparse_pairs()),
        all_groups=sum(map(len, groups.layers)),
        code=code,
        plan=plan_in_short(config),
        measure=f"mosa-evaluate {shlex.join(typed)} --text FILE",
        calibration=calibration_in_short(config),
    )
    return card + HEALED.format(healing=healing) if healing else card


def auto_class_name(model_class: type[PreTrainedModel]) -> str:
    """Of the Auto class that loads a model of this class; of several the one of its task."""
    classes = cast(type[InstalledCodeConfigMixin], model_class.config_class).remote_classes
    found = [auto for auto, name in classes.items() if name == model_class.__name__]
    return next((auto for auto in found if auto not in SEVERAL_TASKS), found[0])


def with_measured(card: str, measured: str) -> str:
    """
    A card that says what was measured.

    Raises:
        ValueError: for one without the section.
    """
    before, title, after = card.partition(LOSSES)
    if not title:
        raise ValueError(f"The model card has no section {LOSSES.strip()!r}, as those of conversions have.")
    _, *later = re.split(r"^(?=## )", after, maxsplit=1, flags=re.MULTILINE)
    return f"{before}{title}\n{measured.strip()}\n" + "".join(f"\n{each}" for each in later)


def plan_in_short(config: SparseGroupsConfig) -> str:
    """Windows, rates and bytes, as sentences."""
    kinds = list(GroupPlan.of_config(config).sparse().values())
    windows = sorted({kind.window for kind in kinds})
    sparsities = sorted(kind.sparsity for kind in kinds)
    overall = len(kinds) / sum(1 / each for each in sparsities)
    of_groups = f" ({sparsities[0]:g} to {sparsities[-1]:g} by group)" if sparsities[0] != sparsities[-1] else ""
    sentences = [
        f"A query reads the last {_range(windows)} tokens, and of those before them one in {overall:.3g}{of_groups}."
    ]
    for length in LENGTHS:
        before, after = planned_bytes(config, length)
        sentences.append(
            f"By this plan, a cache of {length:,} tokens takes {megabytes(after)} instead of {megabytes(before)}."
        )
    return "\n".join(sentences)


def calibration_in_short(config: SparseGroupsConfig) -> str:
    """The text that routers were fitted on, as a sentence."""
    calibration: dict[str, Any] | None = (config.mosa_conversion or {}).get("calibration")
    if not calibration:
        return "What the routers were fitted on is not recorded."
    size = f"{calibration['windows']} windows of {calibration['tokens']} tokens"
    if "text" not in calibration:
        return f"The routers were fitted on {size}."
    return (
        f"The routers were fitted on {size}, spread over this text: {calibration['text']}\n"
        f"(sha256 {calibration['sha256']})."
    )


def healing_in_short(config: SparseGroupsConfig) -> str:
    """What `mosa-heal` trained, and on what, as a sentence; empty if it has not."""
    healing: dict[str, Any] | None = (config.mosa_conversion or {}).get("healing")
    if not healing:
        return ""
    return (
        f"`mosa-heal` (`--learn {healing['learn']}`) brought it back towards its original in {healing['steps']:,} "
        f"steps on this text: {healing['text']}\n(sha256 {healing['sha256']})."
    )


def megabytes(size: int) -> str:
    """Bytes for people, in units of 1,000,000."""
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _front_matter(config: SparseGroupsConfig, class_name: str, base_model: str, is_routers: bool) -> ModelCardData:
    pipeline = next((task for head, task in PIPELINES.items() if class_name.endswith(head)), "feature-extraction")
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline}
    if base_model:
        relation = "adapter" if is_routers else "finetune"
        fields = {"base_model": base_model, "base_model_relation": relation, **fields}
    fields |= (config.mosa_conversion or {}).get("license") or {}
    tags = ["mosa", "sparse-attention", "kv-cache", *(["routers"] if is_routers else [])]
    return ModelCardData(**fields, tags=tags)
