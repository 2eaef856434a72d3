from .configuration_mosa import MosaConfig
from .modeling_mosa import MosaForCausalLM, MosaForSequenceClassification, MosaModel, MosaPreTrainedModel

__all__ = ["MosaConfig", "MosaForCausalLM", "MosaForSequenceClassification", "MosaModel", "MosaPreTrainedModel"]
