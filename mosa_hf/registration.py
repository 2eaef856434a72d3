"""Makes Transformers and PEFT know the MoSA classes. Runs at `import mosa_hf`; running it again changes nothing."""

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from .modeling import MosaConfig, MosaForCausalLM, MosaForSequenceClassification, MosaModel
from .modeling.modeling_mosa import mosa_attention_forward


def register() -> None:
    """Register the models, their names, the attention implementation "mosa" and its mask, and LoRA defaults."""
    AutoConfig.register(MosaConfig.model_type, MosaConfig, exist_ok=True)
    AutoModel.register(MosaConfig, MosaModel, exist_ok=True)
    AutoModelForCausalLM.register(MosaConfig, MosaForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(MosaConfig, MosaForSequenceClassification, exist_ok=True)
    AttentionInterface.register("mosa", mosa_attention_forward)
    # Without a mask function of the same name, padding would be ignored in silence.
    AttentionMaskInterface.register("mosa", sdpa_mask)
    # Where Transformers looks up classes by name: Trainer's label smoothing, pipelines, model cards.
    MODEL_MAPPING_NAMES[MosaConfig.model_type] = MosaModel.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MosaConfig.model_type] = MosaForCausalLM.__name__
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[MosaConfig.model_type] = MosaForSequenceClassification.__name__
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[MosaConfig.model_type] = ["q_proj", "v_proj"]
