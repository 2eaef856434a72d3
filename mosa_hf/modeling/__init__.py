from .configuration import MosaConfig
from .modeling_mosa import MosaForCausalLM, MosaForSequenceClassification, MosaModel

__all__ = ["MosaConfig", "MosaForCausalLM", "MosaForSequenceClassification", "MosaModel"]
