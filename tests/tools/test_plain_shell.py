"""A converted folder where nobody imported `mosa_hf`: Auto classes and pipelines, with trust and without."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from .conftest import TEXT, plain_shell

pytestmark = pytest.mark.slow  # fresh processes

# Each way runs in a fork, as fresh as the process that has imported nothing but what takes longest to import.
SCRIPT = """
import builtins, json, os, sys
import peft, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

original, converted, prompt, answer = sys.argv[1:]
assert "mosa_hf" not in sys.modules

def config(path, options):
    return type(AutoConfig.from_pretrained(path, **options)).__name__

def model(path, options):
    model = AutoModel.from_pretrained(path, **options)
    return [type(model).__name__, model(torch.arange(40)[None]).last_hidden_state[0, -1].tolist()]

def causal_lm(path, options):
    return type(AutoModelForCausalLM.from_pretrained(path, **options)).__name__

def text_generation(path, options):
    return pipeline("text-generation", path, **options)(prompt, max_new_tokens=8, do_sample=False)[0]["generated_text"]

def tokenizer(path, options, auto=AutoTokenizer):
    questions = []
    builtins.input = lambda question: questions.append(question) or "n"
    return [auto.from_pretrained(path, **options)(prompt)["input_ids"], len(questions)]

def processor(path, options):
    return tokenizer(path, options, AutoProcessor)

def outcome(function, path, options):
    try:
        return function(path, options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

outcomes = {}
TRUST = {"plain": {}, "trusted": {"trust_remote_code": True}, "refused": {"trust_remote_code": False}}
ways = [(path, trust) for path in (original, converted) for trust in TRUST]
for function in (config, model, causal_lm, text_generation, tokenizer, processor):
    for path, trust in ways if function in (tokenizer, processor) else [way for way in ways if way[1] != "refused"]:
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump(outcome(function, path, TRUST[trust]), pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            which = "original" if path == original else "converted"
            outcomes[f"{function.__name__}, {which}, {trust}"] = json.load(pipe)
with open(answer, "w") as file:
    json.dump(outcomes, file)
"""
PROMPT = TEXT[:150]


@pytest.fixture(scope="module")
def outcomes(folders, tmp_path_factory) -> dict[str, object]:
    root = tmp_path_factory.mktemp("shell")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(root / "modules"))
        # Nobody answers Transformers' question whether to trust the code.
        plain_shell(sys.executable, "-c", SCRIPT, *folders, PROMPT, root / "answer.json", stdin=subprocess.DEVNULL)
    return json.loads((root / "answer.json").read_text())


def test_auto_classes(outcomes, folders):
    for trust in ("plain", "trusted"):
        assert outcomes[f"config, original, {trust}"] == "LlamaConfig"
        assert outcomes[f"causal_lm, original, {trust}"] == "LlamaForCausalLM"
    assert outcomes["config, converted, trusted"] == "MosaLlamaConfig"
    assert outcomes["causal_lm, converted, trusted"] == "MosaLlamaForCausalLM"
    for folder, way, name in (
        (folders.original, "model, original, plain", "LlamaModel"),
        (folders.original, "model, original, trusted", "LlamaModel"),
        (folders.converted, "model, converted, trusted", "MosaLlamaModel"),
    ):
        found, last = outcomes[way]
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder).model(torch.arange(40)[None]).last_hidden_state
        assert found == name and torch.allclose(torch.tensor(last), expected[0, -1], atol=1e-5)


def test_pipeline(outcomes, folders):
    for folder, ways in ((folders.original, ("plain", "trusted")), (folders.converted, ("trusted",))):
        generate = pipeline("text-generation", str(folder))
        expected = generate(PROMPT, max_new_tokens=8, do_sample=False)[0]["generated_text"]
        for trust in ways:
            assert outcomes[f"text_generation, {folder.name}, {trust}"] == expected
        assert len(expected) > len(PROMPT)


@pytest.mark.parametrize("auto, questions", [("tokenizer", 1), ("processor", 2)])
def test_tokenizers_need_no_trust(auto, questions, outcomes):
    """
    The original's, whatever one answers. Upstream asks all the same where it reads a config of code that it does not
    know; not where it was told, nor where `mosa_hf` was imported (`tests/modeling/test_registration.py`).
    """
    ids, asked = outcomes[f"{auto}, original, plain"]
    assert asked == 0 and len(ids) > 20
    assert outcomes[f"{auto}, converted, plain"] == [ids, questions]
    for trust in ("trusted", "refused"):
        assert outcomes[f"{auto}, original, {trust}"] == outcomes[f"{auto}, converted, {trust}"] == [ids, 0]


def test_without_trust_an_error_names_it(outcomes, folders):
    """Not the advice to upgrade Transformers that an unknown type of model gets. The text is upstream's."""
    for way in ("config", "model", "causal_lm", "text_generation"):
        error = outcomes[f"{way}, converted, plain"]
        assert error.startswith(f"ValueError: The repository {folders.converted} contains custom code"), error
        assert "pass the argument `trust_remote_code=True`" in error and "upgrade" not in error
