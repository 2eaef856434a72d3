"""Programs made of a model, for other runtimes, compute what it computes: on other inputs than the samples, too."""

import inspect
import io
import logging
from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.exporters import DynamoConfig, DynamoExporter, ExportedModel, OnnxConfig, OnnxExporter
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from mosa_hf import ConversionConfig, convert_model, use_backend
from testing.tiny import random_tokens, tiny_base

from ..conftest import native_form
from .conftest import plain_shell

pytestmark = [
    pytest.mark.tools,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own about `torch.jit`
]

SAMPLE = (2, 12)
SHAPES = [SAMPLE, (1, 40), (3, 7), (2, 1)]
NAMES = ["converted", "budget", "int8", "native"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, PreTrainedModel]:
    """A Llama of one layer; with two of its three groups sparse, a budget, and 8-bit entries; a native model."""
    original = tiny_base("llama", hidden_size=48, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=3)
    conversion = ConversionConfig(sparsity=4, window=5, groups=((0, 0), (0, 2)))
    converted = convert_model(original, conversion, random_tokens(4, 64))
    folder = tmp_path_factory.mktemp("converted")
    converted.save_pretrained(folder)
    budget = AutoModelForCausalLM.from_pretrained(folder, mosa_cache_budget=3)
    int8 = AutoModelForCausalLM.from_pretrained(folder, mosa_cache_dtype="int8")
    native = native_form(vocab_size=256, num_hidden_layers=1).model()
    return {"original": original, "converted": converted, "budget": budget, "int8": int8, "native": native}


@pytest.fixture(params=NAMES)
def pair(request, models) -> tuple[PreTrainedModel, ...]:
    """The dense original, and a model of ours."""
    return models["original"], models[request.param]


class Logits(nn.Module):
    """What the simplest exporters want: tensors in, a tensor out."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def batch(batch_size: int, num_tokens: int, padding: str = "left", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask in which the first row has padding, on one of its sides."""
    ids = random_tokens(batch_size, num_tokens, seed=seed)
    mask = torch.ones_like(ids)
    length = min(3, num_tokens - 1)
    if padding == "left":
        mask[0, :length] = 0
    elif padding == "right":
        mask[0, num_tokens - length :] = 0
    return ids, mask


@torch.no_grad()
def check_program(model: PreTrainedModel, program: Callable, shapes=SHAPES) -> None:
    """`program(ids, mask)` gives the logits of `model` on inputs that its export did not see."""
    cases = [(shape, padding) for shape in shapes for padding in ("left", "right", "none")]
    for seed, (shape, padding) in enumerate(cases):
        ids, mask = batch(*shape, padding, seed=seed + 1)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        difference = (torch.as_tensor(program(ids, mask)) - expected)[mask.bool()].abs().max()
        assert difference < 1e-4, (shape, padding, difference)


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    """Whose operators a program consists of."""
    targets = [node.target for node in program.graph.nodes]
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


def exported(model: PreTrainedModel, has_mask: bool = True) -> torch.export.ExportedProgram:
    ids, mask = batch(*SAMPLE)
    inputs = {"input_ids": ids, "use_cache": False}
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=512)}
    shapes = {"input_ids": sizes, "use_cache": None}
    if has_mask:
        inputs["attention_mask"], shapes["attention_mask"] = mask, sizes
    else:
        inputs["position_ids"], shapes["position_ids"] = torch.arange(SAMPLE[1]).expand(SAMPLE), sizes
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes)


def test_torch_export(pair):
    """Any batch and length, and PyTorch's own operators only."""
    for model in pair:
        program = exported(model)
        assert namespaces(program) == {"aten"}
        run = program.module()
        check_program(
            model, lambda ids, mask, run=run: run(input_ids=ids, attention_mask=mask, use_cache=False).logits
        )


def test_our_kernels_in_an_exported_program(models):
    """For those who run it where this package is."""
    model = models["converted"]
    with use_backend("torch"):
        program = exported(model)
    assert namespaces(program) == {"aten", "mosa"}
    run = program.module()
    check_program(model, lambda ids, mask: run(input_ids=ids, attention_mask=mask, use_cache=False).logits)


@torch.no_grad()
def test_torch_export_of_packed_sequences(pair):
    position_ids = torch.cat((torch.arange(9), torch.arange(11), torch.arange(20))).expand(2, -1)
    ids, _ = batch(2, 40)
    for model in pair:
        run = exported(model, has_mask=False).module()
        inputs = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
        assert (run(**inputs).logits - model(**inputs).logits).abs().max() < 1e-4


def test_exported_program_needs_no_mosa(models, tmp_path):
    """It loads, and computes the same, in a process that knows nothing of this package."""
    ids, mask = batch(2, 20, seed=5)
    script = (
        "import sys, torch\n"
        "import transformers.modeling_outputs\n"  # which class the output is
        "ids, mask = torch.load('inputs.pt')\n"
        "program = torch.export.load('model.pt2').module()\n"
        "torch.save(program(input_ids=ids, attention_mask=mask, use_cache=False).logits, 'logits.pt')\n"
        "assert 'mosa_hf' not in sys.modules\n"
    )
    torch.save((ids, mask), tmp_path / "inputs.pt")
    for name in ("original", "budget"):
        torch.export.save(exported(models[name]), tmp_path / "model.pt2")
        plain_shell("python", "-c", script, cwd=tmp_path)
        with torch.no_grad():
            expected = Logits(models[name])(ids, mask)
        assert (torch.load(tmp_path / "logits.pt") - expected)[mask.bool()].abs().max() < 1e-4


def test_jit_trace(pair):
    """What the sample selects is not part of the graph."""
    for model in pair:
        with torch.no_grad():
            traced = torch.jit.trace(Logits(model), batch(*SAMPLE))
        check_program(model, traced)


@pytest.mark.parametrize("pair", ["budget", "native"], indirect=True)
def test_onnx(pair):
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=512)}
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    for model in pair:
        buffer = io.BytesIO()
        torch.onnx.export(Logits(model), batch(*SAMPLE), buffer, dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])

        def program(ids, mask, session=session):
            return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]

        check_program(model, program)


@pytest.mark.parametrize(
    "name, exporter, config",
    [
        ("budget", DynamoExporter, DynamoConfig),
        ("native", DynamoExporter, DynamoConfig),
        ("converted", OnnxExporter, OnnxConfig),
    ],
)
def test_generation_with_a_static_cache(name, exporter, config, models, tmp_path, monkeypatch):
    """Transformers' exporters: prefill and decoding step, saved and loaded, generate what the model generates."""
    # PyTorch warns while it loads, with fewer arguments than its message wants, which pytest takes for an error.
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
    static = {"cache_implementation": "static", "max_cache_len": 32, "disable_compile": True}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for model in (models["original"], models[name]):
        ids, mask = batch(*SAMPLE)
        program = exporter().export_for_generation(
            model, {"input_ids": ids, "attention_mask": mask}, config(), generation_config=GenerationConfig(**static)
        )
        folder = tmp_path / type(model).__name__
        program.save_pretrained(folder)
        program = ExportedModel.from_pretrained(folder, trust_remote_code=True)
        assert list(program.components) == ["prefill", "decode"]
        calls = []

        def run(program=program, calls=calls, **inputs):
            step = "decode" if calls else "prefill"
            calls.append(step)
            known = program.components[step].metadata.kwargs
            return program.runners[step](**{key: value for key, value in inputs.items() if key in known})

        ids, mask = batch(*SAMPLE, seed=7)
        inputs = {"input_ids": ids, "attention_mask": mask}
        expected = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        run.__signature__ = inspect.signature(model.forward)  # `generate` passes what that takes
        model.forward = run
        try:
            actual = model.generate(**inputs, **static, **options, output_logits=True, return_dict_in_generate=True)
        finally:
            del model.forward
        assert calls == ["prefill", *["decode"] * 5]
        assert torch.equal(actual.sequences, expected.sequences)
        for own, other in zip(actual.logits, expected.logits, strict=True):
            assert (own - other).abs().max() < 1e-4


def test_what_cannot_be_exported_says_what_can(models):
    model, (ids, mask) = models["converted"], batch(*SAMPLE)
    with pytest.raises(ValueError, match="`use_cache=False`, or export with a static cache"):
        torch.export.export(model, (ids,))
    with pytest.raises(ValueError, match="`use_cache=False`, or export with a static cache"):
        torch.jit.trace(model, (ids,))
    with pytest.raises(ValueError, match="pass `dynamo=True`"):
        torch.onnx.export(Logits(model), (ids, mask), io.BytesIO(), dynamo=False)
    for chooses in (native_form(mosa_inference_routing="expert_choice").model(), native_form().model().train()):
        with pytest.raises(ValueError, match="selects by thresholds"):
            torch.jit.trace(Logits(chooses), (ids % 97, mask))
    model.generation_config.cache_implementation = "static"
    try:
        recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32)
    finally:
        model.generation_config.cache_implementation = None
    with pytest.raises(ValueError, match="`export_for_generation`"):
        recipe.export(input_ids=ids[:1, :1], cache_position=torch.tensor([0]), strict=False)
