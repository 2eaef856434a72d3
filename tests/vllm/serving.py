"""Models to serve, engines that serve them, and what `generate` says to the same prompts."""

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

import mosa_hf
from mosa_hf.modeling.router import MosaRouter
from testing.tiny import tiny_base

# What vLLM's kernels for CPUs want: heads of 32 numbers at least.
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
PLAN = [
    [{"window": 16, "sparsity": 4}, None],
    [{"window": 40, "sparsity": 3}, {"window": 7, "sparsity": 2}],
    [{"window": 0, "sparsity": 3}, {"window": 16, "sparsity": 8}],
]
NEW_TOKENS = 24


def save_tiny(path: Path, family: str = "llama", plan: list | None = None, seed: int = 0, **fields) -> None:
    """A model with random weights and routers, whose thresholds select as the plan says."""
    base_fields = {name: x for name, x in fields.items() if not name.startswith("mosa_")}
    base = tiny_base(family, seed=seed, **{**SHAPE, **base_fields})
    row = mosa_hf.modeling.family.family_of(family)
    own = {"mosa_plan": plan, "mosa_gate_slope": 0.0} | {k: v for k, v in fields.items() if k.startswith("mosa_")}
    config = row.config_class.from_base(base.config, **own)
    model = mosa_hf.modeling.sparse_models.with_sparse_groups(base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, MosaRouter):
            for parameter in module.parameters():
                parameter.data.normal_(0, 0.3, generator=generator)
    mosa_hf.calibrate_thresholds(model, [torch.randint(2, 256, (1, 512), generator=generator)])
    model.save_pretrained(path)


def save_quantised(path: Path, destination: Path) -> None:
    """The same model in the format of compressed-tensors: weights in 8 bits by channel, activations by token."""
    shutil.copytree(path, destination)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            tensors[f"{name}_scale"], weight = scale, (weight / scale).round().to(torch.int8)
        tensors[name] = weight
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    linear = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel"},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": linear},
    }
    (destination / "config.json").write_text(json.dumps(config))


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 256, (length,), generator=generator).tolist() for length in lengths]


def llama_and_answers(folder: Path, prompts: Sequence[list[int]]) -> tuple[Path, list[list[int]]]:
    """A model with every kind of group, and what it writes."""
    save_tiny(folder, "llama", PLAN)
    return folder, generated(folder, prompts)


@torch.no_grad()
def generated(path: Path | str, prompts: Sequence[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """What Transformers' `generate` writes after each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # PyTorch's fused attention has no softcap
    found = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


@contextmanager
def engine(path: Path | str, **options) -> Iterator[LLM]:
    """An engine in this process."""
    settings = {
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 64 << 20,
    }
    llm = LLM(str(path), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()
        gc.collect()


def served(llm: LLM, prompts: Sequence[list[int]], new_tokens: int = NEW_TOKENS, **options) -> list[list[int]]:
    """What an engine writes after the prompts, read at once; `options` of `LLM.generate`."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False),
        use_tqdm=False,
        **options,
    )
    return [list(each.outputs[0].token_ids) for each in outputs]


def scheduler_of(llm: LLM):
    return llm.llm_engine.engine_core.engine_core.scheduler


def count_preemptions(llm: LLM) -> list[int]:
    """A list to which each further step adds how many requests it preempts."""
    scheduler, counts = scheduler_of(llm), []
    schedule = scheduler.schedule

    def counted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        counts.append(len(output.preempted_req_ids or ()))
        return output

    scheduler.schedule = counted
    return counts


def check_nothing_held(llm: LLM) -> None:
    """All blocks are free, and all rows of the worker's state."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    (manager,) = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert sorted(manager.rows) == list(range(manager.kv_cache_spec.num_rows))
    assert manager.holdings == {}
