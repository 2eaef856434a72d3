"""Greedy tokens are those of `generate`, whatever vLLM does with the requests."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from mosa_hf import MosaLlamaForCausalLM, save_routers, to_dense
from mosa_hf.modeling.router import MosaRouter

from .serving import (
    NEW_TOKENS,
    PLAN,
    check_nothing_held,
    engine,
    generated,
    llama_and_answers,
    random_prompts,
    save_quantised,
    save_tiny,
    served,
)

PROMPTS = random_prompts(1, 5, 40, 70, 150, 333, 600)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return llama_and_answers(tmp_path_factory.mktemp("llama"), PROMPTS)


@pytest.mark.parametrize("chunk", [64, 256, 4096])
def test_chunks(llama, chunk):
    path, expected = llama
    with engine(path, max_num_batched_tokens=chunk) as llm:
        assert served(llm, PROMPTS) == expected
        check_nothing_held(llm)


# What vLLM's model cannot have that the tiny one has.
YARN = {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
FAMILIES = {
    "gemma2": {},
    "gemma3_text": {},
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {**YARN, "original_max_position_embeddings": 512},
    },
    "granite": {},
    "mistral": {},
    "mixtral": {},
    "olmoe": {"hidden_size": 128, "clip_qkv": None},
    "qwen2": {"hidden_size": 128, "use_sliding_window": False, "layer_types": ["full_attention"] * 3},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {},
}


REPRESENTATIVES = ("gemma3_text", "gpt_oss", "qwen3_moe")  # a sliding window, sinks, experts; the others every night


@pytest.mark.parametrize(
    "family", [pytest.param(x, marks=() if x in REPRESENTATIVES else pytest.mark.families) for x in FAMILIES]
)
def test_families(tmp_path, family):
    plan = [PLAN[0], [None, None], PLAN[2]]  # the middle layer has a sliding window, where there is one
    if family == "gpt_oss":  # which has it in every other layer
        plan = [[None, None], PLAN[1], [None, None]]
    save_tiny(tmp_path, family, plan, **FAMILIES[family])
    expected = generated(tmp_path, PROMPTS)
    with engine(tmp_path) as llm:
        assert served(llm, PROMPTS) == expected
        check_nothing_held(llm)


def test_router_biases_and_hidden_layers(tmp_path):
    save_tiny(tmp_path, "llama", PLAN, mosa_router_bias=True, mosa_router_hidden_size=16, mosa_include_first=False)
    expected = generated(tmp_path, PROMPTS)
    with engine(tmp_path) as llm:
        assert served(llm, PROMPTS) == expected


@pytest.mark.parametrize("chunk", [64, 256])
def test_budgets(tmp_path, chunk):
    save_tiny(tmp_path, "llama", PLAN, mosa_cache_budget=20)
    expected = generated(tmp_path, PROMPTS)
    with engine(tmp_path, max_num_batched_tokens=chunk) as llm:
        assert served(llm, PROMPTS) == expected
        check_nothing_held(llm)


def test_windows_and_routers_alone(llama, tmp_path):
    """A folder of routers beside the base model that they are of."""
    model = AutoModelForCausalLM.from_pretrained(llama[0])
    save_routers(model, tmp_path / "routers")
    to_dense(model).save_pretrained(tmp_path / "base")
    routers = {"architectures": ["MosaLlamaForCausalLM"], "mosa_routers": str(tmp_path / "routers")}
    with engine(tmp_path / "base", hf_overrides=routers) as llm:
        assert served(llm, PROMPTS) == llama[1]


def test_quantised_weights(llama, tmp_path):
    """Routers of the model that was quantised, beside it: what vLLM makes of its weights is vLLM's own affair."""
    model = AutoModelForCausalLM.from_pretrained(llama[0])
    to_dense(model).save_pretrained(tmp_path / "base")
    save_quantised(tmp_path / "base", tmp_path / "quantised")
    save_routers(model, tmp_path / "routers")
    for router in model.mosa_routers().values():
        router.threshold.fill_(-1e30)
    save_routers(model, tmp_path / "all_selected")
    with engine(tmp_path / "quantised") as llm:
        dense = served(llm, PROMPTS)

    def answers(routers: str, **options) -> list[list[int]]:
        fields = {"architectures": ["MosaLlamaForCausalLM"], "mosa_routers": str(tmp_path / routers)}
        with engine(tmp_path / "quantised", hf_overrides=fields, **options) as llm:
            return served(llm, PROMPTS)

    assert answers("all_selected") == dense
    sparse = answers("routers")
    assert sparse == answers("routers", max_num_batched_tokens=64)
    assert sparse != dense and sparse != llama[1]


def test_routers_in_place_of_a_models_own(llama, tmp_path):
    """Their plan counts, as `from_pretrained(model, routers=...)` has it."""
    save_tiny(tmp_path / "other", "llama", [PLAN[2], PLAN[0], PLAN[1]])
    save_routers(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), tmp_path / "routers")
    model = MosaLlamaForCausalLM.from_pretrained(llama[0], routers=tmp_path / "routers")
    model.save_pretrained(tmp_path / "both")
    expected = generated(tmp_path / "both", PROMPTS)
    assert expected != llama[1]
    with engine(llama[0], hf_overrides={"mosa_routers": str(tmp_path / "routers")}) as llm:
        assert served(llm, PROMPTS) == expected


def test_weights_are_loaded_anew_with_their_routers(llama, tmp_path):
    save_tiny(tmp_path, "llama", PLAN, seed=1)
    expected = generated(tmp_path, PROMPTS)
    with engine(llama[0]) as llm:
        assert served(llm, PROMPTS) == llama[1]
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path)})
        assert served(llm, PROMPTS) == expected != llama[1]


def test_lora_requests(llama, tmp_path):
    """Requests with an adapter of PEFT beside others without one."""
    path, expected = llama
    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(path), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    with_adapter = generated(tmp_path / "merged", PROMPTS)
    assert with_adapter != expected
    requests = [LoRARequest("adapter", 1, str(tmp_path / "adapter")), None]
    # One place more than there are adapters: on CPUs, vLLM 0.32 gives requests without one what is in the last place.
    with engine(path, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        answers = served(llm, 2 * PROMPTS, lora_request=[each for each in requests for _ in PROMPTS])
    assert answers == with_adapter + expected


@pytest.mark.tools
def test_compiled(llama):
    path, expected = llama
    with engine(path, enforce_eager=False) as llm:
        assert served(llm, PROMPTS) == expected


@torch.no_grad()
def bfloat16_error(path) -> float:
    """How far log-probabilities of what vLLM writes are off those of Transformers in bfloat16, at most."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    with engine(path, dtype="bfloat16") as llm:
        settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], settings, use_tqdm=False)
    errors = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        own = [each[token].logprob for each, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        errors.append(float((torch.tensor(own) - expected).abs().max()))
    return max(errors)


def test_bfloat16(tmp_path):
    save_tiny(tmp_path, "llama", PLAN, initializer_range=0.05)  # as trained models are, less jagged than other tests'
    assert bfloat16_error(tmp_path) < 2e-2


def test_bfloat16_is_as_close_as_that_of_the_original(tmp_path):
    """
    With large weights, vLLM's own dense model is off its counterpart in Transformers by more than 2e-2, too. Of the
    converted one, rounding decides in addition whether a token close to a threshold is selected: here it cannot.
    """
    save_tiny(tmp_path / "sparse", "llama", PLAN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    to_dense(model).save_pretrained(tmp_path / "dense")
    for index, module in enumerate(each for each in model.modules() if isinstance(each, MosaRouter)):
        module.threshold.fill_(1e30 if index % 2 else -1e30)  # no token, or each
    model.save_pretrained(tmp_path / "sure")
    dense, sure = (bfloat16_error(tmp_path / name) for name in ("dense", "sure"))
    assert dense > 2e-2
    assert sure < 2 * dense


@pytest.mark.tools
def test_tensor_parallel(tmp_path, llama):
    """Two processes, a key/value head each, whose groups keep different tokens of the same arenas."""
    path, expected = llama
    script = tmp_path / "serve.py"
    script.write_text(TENSOR_PARALLEL)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    command = [sys.executable, str(script), str(path), str(tmp_path / "prompts.json"), str(tmp_path / "answers.json")]
    subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL, timeout=600)
    assert json.loads((tmp_path / "answers.json").read_text()) == expected


TENSOR_PARALLEL = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    path, prompts, answers = sys.argv[1:]
    llm = LLM(
        path, dtype="float32", max_model_len=1024, enforce_eager=True, max_num_seqs=8, skip_tokenizer_init=True,
        max_num_batched_tokens=256, kv_cache_memory_bytes=8 << 20, tensor_parallel_size=2,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in json.loads(Path(prompts).read_text())],
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False),
    )
    Path(answers).write_text(json.dumps([list(each.outputs[0].token_ids) for each in outputs]))
"""
