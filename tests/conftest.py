"""What the tests share: tiny models of both forms."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Collection, Iterable  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # before anything imports Triton, which reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from mosa_hf import MosaConfig, MosaForCausalLM, MosaForSequenceClassification, MosaModel  # noqa: E402
from mosa_hf.modeling.family import family_of  # noqa: E402
from testing.tiny import text_tokenizer, tiny_base  # noqa: E402

# Property tests draw the same examples in every run, so that none fails by chance on a change of something else;
# `--hypothesis-profile fresh` draws others, which `make fresh` does every night.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.register_profile("fresh", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")

collect_ignore = ["modeling/upstream"]  # suites to inherit from: `test_upstream.py` does
# The first one converts what another one of them needs, which would wait for it.
LONGEST = (
    "conversion/smollm2/test_model.py",
    "modeling/test_compile.py",
    "modeling/test_upstream.py",
    "kernels/test_triton_compile.py",
    "conversion/test_gemma3.py",
    "conversion/smollm2/test_generation.py",
)


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list:
    """Cases of a test, of which those run by default that are `quick`; the others vary them, and are slow."""
    return [pytest.param(x, id=str(x), marks=() if x in quick else pytest.mark.slow) for x in cases]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that none is left for one process at the end."""
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """All that is imported by now stays: `Trainer` collects garbage at each start, and would look through it."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # large, so that what heads do shows in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TINY = {**SHAPE, "num_mosa_heads": 6, "num_mosa_key_value_heads": 3, "mosa_sparsity": 4}
# A layer without MoSA heads, one without dense heads, one with both.
MIXED_LAYERS = {
    "per_layer_config": {
        0: {"num_mosa_heads": 0, "num_mosa_key_value_heads": 0},
        1: {"num_attention_heads": 0, "num_key_value_heads": 0},
    }
}
# The same of sparse groups, with several windows: none, of a token, of more.
PLAN = [
    [None] * 3,
    [{"window": 5, "sparsity": 4}, {"window": 1, "sparsity": 3}, {"window": 5, "sparsity": 4}],
    [{"window": 0, "sparsity": 4}, None, {"window": 5, "sparsity": 3}],
]


@dataclass(frozen=True)
class Form:
    """A way to sparse attention: classes, and what makes a tiny model of them."""

    config_class: type
    model_class: type
    causal_lm_class: type
    classifier_class: type
    fields: dict[str, Any] = field(default_factory=dict)

    def config(self, **fields):
        return self.config_class(**{**self.fields, **fields})

    def model(self, seed: int = 0, **fields):
        """A causal language model of random weights."""
        torch.manual_seed(seed)
        return self.causal_lm_class(self.config(**fields)).eval()


def native_form(**fields) -> Form:
    """The native model: dense heads and the paper's heads."""
    classes = (MosaConfig, MosaModel, MosaForCausalLM, MosaForSequenceClassification)
    return Form(*classes, {**TINY, **fields})


def sparse_form(family: str = "llama", **fields) -> Form:
    """A family with sparse groups."""
    row = family_of(family)
    heads = (row.head_classes[name] for name in ("ForCausalLM", "ForSequenceClassification"))
    shape = {**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3, "mosa_plan": PLAN}
    return Form(row.config_class, row.model_class, *heads, {**shape, **fields})


FORMS = {"native": native_form(**MIXED_LAYERS), "sparse": sparse_form()}


@pytest.fixture(params=FORMS)
def form(request) -> Form:
    return FORMS[request.param]


def tiny_config(**fields) -> MosaConfig:
    return native_form().config(**fields)


def tiny_model(seed: int = 0, **fields) -> MosaForCausalLM:
    return native_form().model(seed, **fields)


def tiny_llama(seed: int = 0, **fields) -> LlamaForCausalLM:
    """The stock model of the same shape."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | fields)).eval()


@pytest.fixture
def fresh_compiler() -> None:
    """A compiler that has compiled nothing yet."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """The folder of what `testing` fetches, with nothing in it."""
    monkeypatch.setenv("MOSA_HF_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and a tokenizer of words, as the commands that pages show read one."""
    folder = tmp_path_factory.mktemp("text_model")
    tiny_base(vocab_size=256, max_position_embeddings=8192).save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder
