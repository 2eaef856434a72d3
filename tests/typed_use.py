"""A user's script, for `make lint` alone: mypy finds the classes that are made when `mosa_hf` is imported."""

import torch
from transformers import LlamaForCausalLM

import mosa_hf
from mosa_hf import (
    ConversionConfig,
    GroupPlan,
    MosaConfig,
    MosaForCausalLM,
    MosaGptOssModel,
    MosaLlamaConfig,
    MosaLlamaForCausalLM,
    MosaQwen3Config,
    MosaQwen3ForCausalLM,
)


def use(base: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    config = MosaLlamaConfig(hidden_size=32, mosa_window=3, mosa_sparsity=4)
    window: int = config.mosa_window
    model: LlamaForCausalLM = MosaLlamaForCausalLM(config)
    decoder: type[MosaGptOssModel] = MosaGptOssModel
    others = MosaQwen3ForCausalLM(MosaQwen3Config()), MosaForCausalLM(MosaConfig(num_mosa_heads=4))
    converted = mosa_hf.convert_model(base, ConversionConfig(window=window), tokens)
    with mosa_hf.trace_routing(model) as selected, mosa_hf.use_backend("torch"):
        print(model(tokens).logits, decoder, others, GroupPlan.of_config(converted.config))
    print(selected[0][0].shape, mosa_hf.__version__)
