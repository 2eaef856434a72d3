"""The main job on the real model: SmolLM2-135M converted, loaded; its quality, its cache and its memory."""

import filecmp
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import demo, metrics
from mosa_hf import cache_bytes
from mosa_hf.conversion import calibration_windows
from mosa_hf.evaluation import text_samples
from testing import corpora, pretrained

from .conftest import fetched

pytestmark = pytest.mark.real


def test_the_base_is_untouched(converted_directory):
    """The converted folder's weights are the base's file, byte for byte, and a few MB of routers."""
    base = pretrained.smollm2_directory() / "model.safetensors"
    linked = [path for path in converted_directory.glob("*.safetensors") if path.stat().st_size > 100e6]
    assert len(linked) == 1 and (linked[0].samefile(base) or filecmp.cmp(linked[0], base, shallow=False))
    others = sum(path.stat().st_size for path in converted_directory.iterdir() if path not in linked)
    assert others < 10e6


SCRIPT = """
import sys, torch, mosa_hf
from transformers import AutoModel, AutoModelForCausalLM, pipeline
path = sys.argv[1]
torch.set_grad_enabled(False)
input_ids = torch.arange(1000, 1100)[None]
logits = []
for kwargs in ({}, *({"attn_implementation": name} for name in ("mosa", "sdpa", "eager"))):
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    logits.append(model(input_ids).logits)
    hidden = AutoModel.from_pretrained(path, **kwargs)(input_ids).last_hidden_state
    assert (model.lm_head(hidden) - logits[0]).abs().max() < 1e-4, kwargs
    assert (logits[-1] - logits[0]).abs().max() < 1e-4, kwargs
generator = pipeline("text-generation", model=path)
assert "Paris" in generator("The capital of France is", max_new_tokens=5, do_sample=False)[0]["generated_text"]
"""


def test_loads_everywhere_in_a_fresh_process(converted_directory):
    subprocess.run([sys.executable, "-c", SCRIPT, converted_directory], check=True)


PEAK = """
import re, sys, torch, mosa_hf
from transformers import AutoModelForCausalLM

def held(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
input_ids = torch.load(sys.argv[2])
model.generate(input_ids[:, :2], max_new_tokens=2, do_sample=False)  # weights and code are in memory now
before = held("VmRSS")
output = model.generate(
    input_ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=512, return_dict_in_generate=True
)
print(held("VmHWM") - before, sum(mosa_hf.cache_bytes(output.past_key_values).values()))
"""


def test_peak_memory_falls_with_the_cache(converted_directory, tokenizer, tmp_path):
    """
    Of two processes that generate after 3072 tokens, the converted model's grows less by what its cache saved. The
    prompt is read in chunks, as long prompts are, and blocks of 100 KB and more are mapped one by one: glibc's
    default, which grows its heap around them, left between 56 and 165 MB of 96 MB saved from run to run.
    """
    torch.save(calibration_windows(tokenizer, fetched(corpora.text, "shakespeare"), 1, 3072), tmp_path / "prompt.pt")
    runs = []
    for directory in (fetched(pretrained.smollm2_directory), converted_directory):
        command = [sys.executable, "-c", PEAK, directory, tmp_path / "prompt.pt"]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_ARENA_MAX": "1"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        runs.append([int(number) for number in output.split()[-2:]])
    (dense, dense_cache), (mosa, mosa_cache) = runs
    print(f"peak {dense / 1e6:.0f} -> {mosa / 1e6:.0f} MB, cache {dense_cache / 1e6:.0f} -> {mosa_cache / 1e6:.0f} MB")
    assert dense - mosa >= 0.8 * (dense_cache - mosa_cache) > 50e6


def test_quality(converted, original, tokenizer):
    """At most 6 % more perplexity than the original on prose that calibration never saw."""
    windows = calibration_windows(tokenizer, fetched(corpora.text, "debian_handbook"), 2, 1024)
    before, after = metrics.perplexity(original, windows), metrics.perplexity(converted, windows)
    print(f"perplexity {before:.2f} -> {after:.2f}")
    assert after <= 1.06 * before


def test_cache_bytes_follow_the_formula(converted, original, tokenizer):
    prompt = calibration_windows(tokenizer, fetched(corpora.text, "shakespeare"), 1, 768)
    cache = metrics.filled_cache(converted, prompt)
    held = sum(cache_bytes(cache).values())
    assert abs(held / metrics.formula_bytes(converted, prompt) - 1) < 0.05
    assert held < 0.65 * metrics.kv_bytes(original, prompt)


def test_the_demo_reads_the_same_on_every_machine(tokenizer):
    """Its passages, needles and questions, and the calibration text, token by token."""
    read = [each.to_dict() for each in fetched(demo.samples, tokenizer)]
    for content, expected in (
        (read, "425fd0ca2d67ba6c"),
        (metrics.calibration(tokenizer).tolist(), "cefa0218d13d44ee"),
    ):
        assert hashlib.sha256(json.dumps(content).encode()).hexdigest().startswith(expected)


def test_the_comparison_of_the_demo(converted, original, tokenizer):
    """The baseline really has as many bytes, and every model has a speed."""
    samples = text_samples(tokenizer, "encyclopaedia", fetched(corpora.text, "encyclopaedia"), 704, 64, 1)
    result = demo.compare(original, converted, samples)
    dense, mosa, baseline = (row["kv_bytes"] for row in result["rows"])
    assert abs(baseline / mosa - 1) < 0.05
    assert mosa < 0.5 * dense
    assert all(result["tokens_per_second"][name] > 0 for name in (demo.ORIGINAL, demo.CONVERTED, demo.BASELINE))
