"""
Time of one decoding step of latent attention (MLA) against upstream's, at the same length: a DeepSeek-V3 with random
weights, small but of that model's proportions, whose sparse groups keep every latent (ρ = 1), or no more than a window
of 512.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.latent_decode

All contenders take turns of several tokens in one process, so that a slow minute of the machine hits all alike.
"expanded" is the sparse model made to expand what it reads, as upstream does, instead of absorbing the projection.
"""

import argparse
import statistics
import sys

import torch
from tqdm.auto import tqdm
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from mosa_hf import cache_bytes
from mosa_hf.modeling.family import family_of
from mosa_hf.modeling.latent_attention import LatentAttentionMixin
from mosa_hf.modeling.sparse_models import with_sparse_groups

from ..provenance import about, origin_of
from .decode import TURN, Decoder

FIELDS = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 256,
    "max_position_embeddings": 16384,
}


def contenders() -> dict[str, PreTrainedModel]:
    """By name: the original, and models with sparse groups that have its weights."""
    torch.manual_seed(0)
    original = DeepseekV3ForCausalLM(DeepseekV3Config(**FIELDS)).eval()
    config_class = family_of("deepseek_v3").config_class

    def sparse(**fields) -> PreTrainedModel:
        return with_sparse_groups(original, config_class.from_base(original.config, **fields))

    expanded = sparse(mosa_sparsity=1, mosa_window=64)
    for module in expanded.modules():
        if isinstance(module, LatentAttentionMixin):
            module.absorbing_is_cheaper = lambda query, read: False
    return {
        "original": original,
        "every latent kept": sparse(mosa_sparsity=1, mosa_window=64),
        "every latent kept, expanded": expanded,
        "window 512": sparse(mosa_plan=[[{"window": 512, "sparsity": 1e6}]] * FIELDS["num_hidden_layers"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens before the first step")
    parser.add_argument("--turns", type=int, default=12, help=f"of {TURN} steps each, of every contender")
    arguments = parser.parse_args()
    num_steps = arguments.turns * TURN
    text = torch.randint(
        FIELDS["vocab_size"], (1, arguments.length + num_steps), generator=torch.Generator().manual_seed(1)
    )
    decoders = {name: Decoder(model, text[:, : arguments.length]) for name, model in contenders().items()}
    for turn in tqdm(range(arguments.turns), desc="Decoding", unit="turn"):
        tokens = text[:, arguments.length + turn * TURN :][:, :TURN]
        for decoder in decoders.values():
            decoder.take_turn(tokens, is_busy=False)
    base = decoders["original"].seconds[False]
    print("| contender | ms, median | of the original's | ms, least | of the original's | cache bytes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, decoder in decoders.items():
        own = decoder.seconds[False]
        cells = [name]
        for figure in (statistics.median, min):
            cells += [f"{1e3 * figure(own):.2f}", f"{figure(own) / figure(base):.2f}"]
        print("| " + " | ".join([*cells, f"{sum(cache_bytes(decoder.cache).values()):,}"]) + " |")
    print(f"\n{arguments.length} tokens, {num_steps} steps each.\n")
    print(about([origin_of("benchmarks.speed.latent_decode", sys.argv[1:])]))


if __name__ == "__main__":
    main()
