"""Conversion of Llama checkpoints: lossless where nothing is selected, recorded, and refused where it cannot work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mosa_hf.conversion_scripts import convert as command
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from mosa_hf import ConversionConfig, MosaForCausalLM, convert_checkpoint, convert_model, trace_routing
from mosa_hf.conversion import calibration_windows, checkpoint

from .conftest import TINY

FORMS = {"all": {"window": 5}, "selected": {"query_tokens": "selected", "window": 0}}
TEXT = " ".join(f"the {i}th word of a text that is long enough;" for i in range(60))


def tiny_llama(seed: int = 0, **fields) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {name: value for name, value in TINY.items() if "mosa" not in name}
    shape |= {"vocab_size": 256, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(**shape, **fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def source(tmp_path) -> Path:
    """A Llama checkpoint in several shards, with a tokenizer."""
    path = tmp_path / "source"
    tiny_llama().save_pretrained(path, max_shard_size="60kB")
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("groups", [None, ((0, 0), (0, 1), (0, 2), (2, 1))], ids=["all_groups", "some_groups"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_lossless_without_sparsity(form, groups, fields):
    """ρ = 1: the converted model computes what the original computes, cached or not."""
    model = tiny_llama(**fields)
    converted = convert_model(model, ConversionConfig(sparsity=1, groups=groups, **FORMS[form]))
    input_ids = torch.randint(256, (2, 40))
    expected = model(input_ids).logits
    assert (converted(input_ids).logits - expected).abs().max() < 1e-4
    assert torch.equal(
        converted.generate(input_ids, max_new_tokens=16, do_sample=False),
        model.generate(input_ids, max_new_tokens=16, do_sample=False),
    )
    assert converted.num_parameters() >= model.num_parameters()
    for parameter in converted.parameters():
        parameter.add_(1.0)  # the two models share no memory
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize("form", FORMS)
def test_conversion_ranks_fits_and_records(form):
    model = tiny_llama()
    calibration = torch.randint(256, (6, 64), generator=torch.Generator().manual_seed(0))
    converted = convert_model(model, ConversionConfig(num_groups=5, sparsity=4, **FORMS[form]), calibration)
    record = converted.config.mosa_conversion
    scores = {(i, j): score for i, layer in enumerate(record["scores"]) for j, score in enumerate(layer)}
    assert len(record["groups"]) == 5 and record["calibration"] == {"windows": 6, "tokens": 64}
    taken = [scores[tuple(pair)] for pair in record["groups"]]
    left = [score for pair, score in scores.items() if list(pair) not in record["groups"]]
    assert min(taken) >= max(left)
    assert json.loads(converted.config.to_json_string())["mosa_conversion"] == record
    for layer in range(3):
        config = converted.config.per_layer_config[layer]
        assert config.num_mosa_key_value_heads == sum(pair[0] == layer for pair in record["groups"])
        assert config.num_mosa_key_value_heads + config.num_key_value_heads == 3
    with torch.no_grad(), trace_routing(converted) as selected:
        converted(calibration, use_cache=False)
    for calls in selected.values():
        assert 0.2 < calls[0].float().mean() < 0.35  # one in four, and the first tokens

    # The routers pass a gradient when healing starts.
    converted.train()(calibration, labels=calibration).loss.backward()
    gradients = [p.grad for name, p in converted.named_parameters() if "router" in name]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_groups": 0}, "`num_groups` must be at least 1"),
        ({"num_groups": 2, "groups": ((0, 0),)}, "exclude each other"),
        ({"groups": ((0, 0), (0, 0))}, "twice"),
        ({"sparsity": 0.5}, "`sparsity` must be at least 1"),
        ({"query_tokens": "some"}, "`query_tokens` must be"),
        ({"query_tokens": "selected"}, "`window` must be 0 or more, and 0 for"),
        ({"window": -1}, "`window` must be 0 or more"),
    ],
)
def test_impossible_conversions(fields, message):
    with pytest.raises(ValueError, match=message):
        ConversionConfig(**fields)


def test_models_that_cannot_be_converted():
    lossless = ConversionConfig(sparsity=1)
    with pytest.raises(ValueError, match="'gpt2' cannot be converted; supported: .*llama"):
        convert_model(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)), lossless)
    with pytest.raises(ValueError, match="no language-modeling head.*AutoModelForCausalLM"):
        convert_model(LlamaModel(tiny_llama().config), lossless)
    with pytest.raises(ValueError, match="`calibration` is needed to fit routers"):
        convert_model(tiny_llama(), ConversionConfig())
    with pytest.raises(ValueError, match="`num_groups=10`: the model has 3 x 3"):
        convert_model(tiny_llama(), ConversionConfig(num_groups=10, sparsity=1))
    with pytest.raises(ValueError, match=r"`groups` names \[\(3, 0\)\]"):
        convert_model(tiny_llama(), ConversionConfig(groups=((3, 0),), sparsity=1))
    with pytest.raises(ValueError, match="needed to rank groups"):
        convert_model(tiny_llama(), ConversionConfig(num_groups=2, sparsity=1))


def test_convert_a_directory(source, tmp_path):
    destination = tmp_path / "deep" / "converted"
    convert_checkpoint(source, destination, ConversionConfig(num_groups=4, window=8), TEXT, 3, 64)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(destination), AutoTokenizer.from_pretrained(destination)
    assert type(model) is MosaForCausalLM
    assert model.config.mosa_conversion["source"] == "source"
    assert tokenizer("hello")["input_ids"] == byte_tokenizer()("hello")["input_ids"]
    assert [path.name for path in destination.parent.iterdir()] == ["converted"]
    with pytest.raises(FileExistsError, match="exists: remove it"):
        convert_checkpoint(source, destination, ConversionConfig(sparsity=1))


def test_the_command(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = [source, tmp_path / "converted", "--calibration", text, "--groups=9", "--window=8", "--windows=2"]
    subprocess.run(
        [sys.executable, "conversion_scripts/convert.py", *arguments, "--window-length=64"],
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "converted").config.mosa_window == 8
    with pytest.raises(SystemExit, match="mosa-convert: .*exists: remove it"):
        command.main([str(source), str(tmp_path / "converted")])
    with pytest.raises(SystemExit, match="mosa-convert: .*does not exist"):
        command.main([str(tmp_path / "nowhere"), str(tmp_path / "other")])


def truncate(source: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])


def remove_a_shard(source: Path) -> None:
    sorted(source.glob("*.safetensors"))[-1].unlink()


def change_a_shape(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))


def drop_a_tensor(source: Path) -> None:
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("model.norm.weight", None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})


DAMAGES = {
    "truncated": (truncate, ValueError, "damaged or truncated.*download it again"),
    "shard_missing": (remove_a_shard, FileNotFoundError, "lacks the weight file model-0000.*download it again"),
    "shapes": (change_a_shape, ValueError, "has shape .*config.json asks for.*different models"),
    "tensor_missing": (drop_a_tensor, ValueError, "lack model.norm.weight"),
    "no_config": (lambda source: (source / "config.json").unlink(), FileNotFoundError, "no config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sources(damage, source, tmp_path):
    inflict, error, message = DAMAGES[damage]
    inflict(source)
    with pytest.raises(error, match=message):
        convert_checkpoint(source, tmp_path / "converted", ConversionConfig(sparsity=1))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_short_calibration_text(source, tmp_path):
    with pytest.raises(ValueError, match="has 10 tokens, fewer than one window of 64.*`window_length`"):
        convert_checkpoint(source, tmp_path / "converted", ConversionConfig(), "ten bytes.", 2, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_calibration_windows_spread_over_the_text():
    windows = calibration_windows(byte_tokenizer(), TEXT, num_windows=3, window_length=100)
    everything = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])
    last = len(everything) // 100 - 1
    assert torch.equal(windows[0], everything[:100])
    assert torch.equal(windows[2], everything[last * 100 : last * 100 + 100])


@pytest.mark.parametrize("moment", ["save_pretrained", "convert_model"])
def test_an_interrupted_conversion_leaves_nothing(moment, source, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        if moment == "save_pretrained":  # halfway: some files are written
            (Path(args[1]) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    owner = MosaForCausalLM if moment == "save_pretrained" else checkpoint
    monkeypatch.setattr(owner, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "converted", ConversionConfig(sparsity=1))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("damage", ["truncated", "shard_missing", "shapes"])
def test_loading_a_damaged_mosa_checkpoint(damage, tmp_path):
    converted = convert_model(tiny_llama(), ConversionConfig(sparsity=1, window=5))
    converted.save_pretrained(tmp_path, max_shard_size="60kB")
    DAMAGES[damage][0](tmp_path)
    error, message = DAMAGES[damage][1:]
    if damage == "shapes":  # upstream's own error, which comes with a report
        error, message = RuntimeError, "mismatched"
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
