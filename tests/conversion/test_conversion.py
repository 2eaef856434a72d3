"""Conversion in memory and by command: lossless where nothing is selected, recorded, refused where it cannot work."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, LlamaForQuestionAnswering

from mosa_hf import (
    ConversionConfig,
    GroupPlan,
    MosaForCausalLM,
    MosaLlamaConfig,
    MosaLlamaForCausalLM,
    convert_checkpoint,
    convert_model,
    load_routers,
    save_routers,
    trace_routing,
)
from mosa_hf.cli import convert as command
from mosa_hf.conversion import calibration_windows, convert_to_native
from mosa_hf.conversion.allocation import candidate_plan
from mosa_hf.conversion.calibration import fit_routers
from mosa_hf.conversion.windows import spread
from mosa_hf.modeling.group_plan import SparseGroup
from testing.tiny import QUIET, byte_tokenizer, random_tokens, tiny_base

TEXT = " ".join(f"the {i}th word of a text that is long enough;" for i in range(60))
FAMILIES = ("llama", "gpt_neox", "gemma3_text", "phi3", "mixtral")  # others: `test_families`
SOME = ((0, 0), (0, 1), (2, 1))


@pytest.fixture
def source(tmp_path) -> Path:
    """A Llama checkpoint in several shards, with a tokenizer."""
    path = tmp_path / "source"
    tiny_base().save_pretrained(path, max_shard_size="30kB")
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("groups", [None, SOME], ids=["all_groups", "some_groups"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lossless_without_sparsity(family, groups):
    """ρ = 1: the converted model computes what the original computes, cached or not."""
    model = tiny_base(family)
    converted = convert_model(model, ConversionConfig(sparsity=1, groups=groups, window=5))
    input_ids = random_tokens(2, 40)
    assert (converted(input_ids).logits - model(input_ids).logits).abs().max() < 1e-4
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 16, "do_sample": False}
    assert torch.equal(converted.generate(input_ids, **options), model.generate(input_ids, **options))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_conversion_ranks_fits_and_records(family):
    model = tiny_base(family)
    calibration = random_tokens(6, 64)
    converted = convert_model(model, ConversionConfig(groups=3, sparsity=4, window=5), calibration)
    record = converted.config.mosa_conversion
    losses = {(i, j): loss for i, layer in enumerate(record["losses"]) for j, loss in enumerate(layer)}
    assert len(record["groups"]) == 3 and record["calibration"] == {"windows": 6, "tokens": 64}
    taken = [losses.pop(tuple(pair)) for pair in record["groups"]]
    left = [loss for loss in losses.values() if loss is not None]
    assert left and max(taken) <= min(left)
    # Layers with a sliding window are no candidates.
    none = [pair for pair, loss in losses.items() if loss is None]
    assert none == ([(1, 0), (1, 1)] if family == "gemma3_text" else [])
    assert json.loads(converted.config.to_json_string())["mosa_conversion"] == record
    plan = GroupPlan.of_config(converted.config)
    assert [list(pair) for pair in plan.sparse_pairs()] == record["groups"]
    with torch.no_grad(), trace_routing(converted) as selected:
        converted(calibration, use_cache=False)
    rates = torch.cat([calls[0].float().mean((0, 1)) for calls in selected.values()])
    assert len(rates) == 3 and 0.2 < rates.mean() < 0.35  # one in four over all groups, and the first tokens
    own = torch.tensor([1 / kind.sparsity for groups in plan.layers for kind in groups if kind is not None])
    assert (rates - own).abs().max() < 0.1 and own.max() > 1.2 * own.min()


@pytest.mark.parametrize("fields", [{"groups": SOME}, {"groups": 3}, {"plan": None}], ids=["pairs", "number", "plan"])
def test_conversions_share_one_fit(fields):
    model, calibration = tiny_base(), random_tokens(4, 64)
    config = MosaLlamaConfig.from_base(model.config)
    fits = fit_routers(model, calibration, candidate_plan(config, ConversionConfig()))
    if "plan" in fields:
        kind = SparseGroup(window=7, sparsity=3.0)
        conversion = ConversionConfig(plan=GroupPlan(((kind, None), (None, None), (kind, kind))))
    else:
        conversion = ConversionConfig(sparsity=4, window=5, **fields)
    shared = convert_model(model, conversion, calibration, fits)
    alone = convert_model(model, conversion, calibration)
    assert GroupPlan.of_config(shared.config).sparse_pairs() == GroupPlan.of_config(alone.config).sparse_pairs()
    for layer, router in alone.mosa_routers().items():
        torch.testing.assert_close(shared.mosa_routers()[layer].weight, router.weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(shared.mosa_routers()[layer].threshold, router.threshold, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="thresholds"):
        convert_model(model, conversion, fits=fits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_has_no_part_in_it(dtype):
    """What a model in float32 becomes is rounded to no other, native or not."""

    def states() -> list[tuple[str, torch.Tensor]]:
        kind = {"sparsity": 4, "groups": 3}
        sparse = convert_model(model, ConversionConfig(window=5, **kind), calibration)
        native = convert_to_native(model, ConversionConfig(window=0, **kind), calibration)
        configs = [(str(each.config.mosa_conversion), torch.tensor(0)) for each in (sparse, native)]
        tensors = [(*each.named_parameters(), *each.named_buffers()) for each in (sparse, native)]
        return [*configs, *tensors[0], *tensors[1], ("windows", spread(torch.arange(999)[:, None], 300))]

    model, calibration = tiny_base(), random_tokens(2, 64)
    expected = states()
    torch.set_default_dtype(dtype)
    try:
        found = states()
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, states_before), (own_name, states_after) in zip(expected, found, strict=True):
        assert name == own_name
        torch.testing.assert_close(states_after, states_before, rtol=0, atol=0, msg=name)


def test_routers_are_frozen_until_healing(tmp_path):
    """As converted, and as loaded, training leaves the routers alone; with a gate they get a gradient."""
    model = tiny_base()
    calibration = random_tokens(2, 64)
    converted = convert_model(model, ConversionConfig(sparsity=4, window=5), calibration)
    converted.save_pretrained(tmp_path)
    loaded, info = type(converted).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for each in (converted, loaded):
        assert not any(p.requires_grad for name, p in each.named_parameters() if "mosa_router" in name)
    healed = type(converted).from_pretrained(tmp_path, mosa_gate_slope=1.0)
    assert all(router.weight.requires_grad for router in healed.mosa_routers().values())
    before = [router.threshold.clone() for router in converted.mosa_routers().values()]
    converted.train()(calibration, labels=calibration, use_cache=False).loss.backward()
    assert all(torch.equal(x, y.threshold) for x, y in zip(before, converted.mosa_routers().values(), strict=True))
    weights = [each.model.layers[0].self_attn.q_proj.weight for each in (converted, model)]
    assert weights[0].grad.abs().max() > 0 and weights[1].grad is None  # in one memory, but parameters of their own
    assert weights[0].data_ptr() == weights[1].data_ptr()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"groups": 0}, "`groups` must be at least 1"),
        ({"groups": ()}, "`groups` names no"),
        ({"groups": ((0, 0), (0, 0))}, "twice"),
        ({"groups": ((0, 0, 0),)}, "`groups` must be a number or"),
        ({"groups": True}, "`groups` must be a number or"),
        ({"groups": 1.5}, "`groups` must be a number or"),
        ({"groups": [0]}, "`groups` must be a number or"),
        ({"include_first": "no"}, "`include_first` must be True or False"),
        ({"plan": [[None]]}, "`plan` must be a `GroupPlan` or the path of one, got a list: `GroupPlan.from_list`"),
        ({"sparsity": 0.5}, "`sparsity` must be a finite number of at least 1"),
        ({"sparsity": float("nan")}, "`sparsity` must be a finite number of at least 1"),
        ({"window": -1}, "`window` must be an integer of at least 0"),
        ({"window": 8.0}, "`window` must be an integer of at least 0"),
        ({"plan": GroupPlan(((None,),)), "groups": 3, "window": 3}, "leave out `window`, `groups`"),
    ],
)
def test_impossible_conversions(fields, message):
    with pytest.raises(ValueError, match=message):
        ConversionConfig(**fields)


def test_what_is_no_model_or_no_conversion():
    with pytest.raises(ValueError, match="`model` must be a model.*got 'some/base': `convert_checkpoint`"):
        convert_model("some/base", ConversionConfig())
    with pytest.raises(ValueError, match="`conversion` must be a `ConversionConfig`, got {'window': 8}"):
        convert_model(tiny_base(), {"window": 8})
    for config in (tiny_base(), tiny_base().config):
        with pytest.raises(ValueError, match="`config` is a Llama.*names no sparse groups: pass `model.config`"):
            GroupPlan.of_config(config)
    with pytest.raises(ValueError, match=r"group 1 of layer 0 is \(8, 4\); give a `SparseGroup`"):
        GroupPlan(((None, (8, 4)),))


@torch.no_grad()
def test_the_softcap_that_old_versions_leave_out(tmp_path):
    """Until Transformers refused it, a Gemma 2 was loaded with "sdpa", which ignores its softcap."""
    base = tiny_base("gemma2", attn_logit_softcapping=1.0)
    base.save_pretrained(tmp_path / "base")
    lossless, ids = ConversionConfig(sparsity=1, window=4), random_tokens(2, 20)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if loaded.config._attn_implementation == "sdpa":
        with pytest.raises(ValueError, match='softcap of Gemma2ForCausalLM.*`attn_implementation="eager"`'):
            convert_model(loaded, lossless)
        loaded.set_attn_implementation("eager")
    torch.testing.assert_close(convert_model(loaded, lossless)(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)
    convert_checkpoint(tmp_path / "base", tmp_path / "converted", lossless)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    torch.testing.assert_close(converted(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)


def test_models_that_cannot_be_converted():
    lossless = ConversionConfig(sparsity=1)
    with pytest.raises(ValueError, match="'bert' cannot have sparse groups: it is an encoder, or has one"):
        convert_model(BertLMHeadModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2)), lossless)
    with pytest.raises(ValueError, match="`calibration` is needed to fit routers"):
        convert_model(tiny_base(), ConversionConfig())
    with pytest.raises(
        ValueError,
        match="`groups=7`: the model has 6 key/value groups that can be sparse, in 3 layers with global",
    ):
        convert_model(tiny_base(), ConversionConfig(groups=7, sparsity=1))
    with pytest.raises(ValueError, match=r"`groups` names \[\(3, 0\)\]"):
        convert_model(tiny_base(), ConversionConfig(groups=((3, 0),), sparsity=1))
    with pytest.raises(ValueError, match=r"`groups` names \[\(1, 0\)\].*layers \[1\] stay dense: its attention has"):
        convert_model(tiny_base("gemma3_text"), ConversionConfig(groups=((1, 0),), sparsity=1))
    with pytest.raises(ValueError, match="needed to rank groups"):
        convert_model(tiny_base(), ConversionConfig(groups=2, sparsity=1))
    with pytest.raises(ValueError, match="nothing to convert: of every layer, its attention has a sliding window"):
        convert_model(tiny_base("gemma3_text", layer_types=["sliding_attention"] * 3), lossless)
    with pytest.raises(ValueError, match="leaves every group dense"):
        convert_model(tiny_base(), ConversionConfig(plan=GroupPlan(((None, None),) * 3)))
    with pytest.raises(ValueError, match="The plan has 1 layers, but the model has 3"):
        convert_model(tiny_base(), ConversionConfig(plan=GroupPlan(((None, SparseGroup(8, 1)),))))
    with pytest.raises(ValueError, match="layer 1 sparse, but its attention has a sliding window"):
        convert_model(tiny_base("gemma3_text"), ConversionConfig(plan=GroupPlan.uniform(3, 2, SparseGroup(8, 1))))
    adapted = get_peft_model(tiny_base(), LoraConfig(target_modules="all-linear"))
    paper = ConversionConfig(sparsity=1, window=0)
    for convert, conversion in ((convert_model, lossless), (convert_to_native, paper)):
        with pytest.raises(ValueError, match=r"`model` is a PEFT model.*: pass `model.merge_and_unload\(\)`\.$"):
            convert(adapted, conversion)
        with pytest.raises(ValueError, match="`torch.compile` wraps .*: pass what it wraps, `model._orig_mod`"):
            convert(torch.compile(tiny_base()), conversion)
    with pytest.raises(ValueError, match="DataParallel or DeepSpeed wraps.*`model.module`"):
        convert_to_native(torch.nn.DataParallel(tiny_base()), paper)
    converted = convert_model(tiny_base(), lossless)
    with pytest.raises(ValueError, match="MosaLlamaForCausalLM is converted already"):
        convert_model(converted, lossless)
    assert isinstance(convert_model(LlamaForQuestionAnswering(tiny_base().config), lossless).config.mosa_window, int)


def test_convert_a_directory(source, tmp_path):
    destination = tmp_path / "deep" / "converted"
    plan = convert_checkpoint(
        source, destination, ConversionConfig(groups=4, window=8), TEXT, num_windows=3, window_length=64
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(destination), AutoTokenizer.from_pretrained(destination)
    assert type(model) is MosaLlamaForCausalLM
    assert model.config.mosa_conversion["source"] == "source"
    assert plan == GroupPlan.of_config(model.config) and len(plan.sparse_pairs()) == 4
    assert tokenizer("hello")["input_ids"] == byte_tokenizer()("hello")["input_ids"]
    assert [path.name for path in destination.parent.iterdir()] == ["converted"]
    with pytest.raises(FileExistsError, match="exists: remove it"):
        convert_checkpoint(source, destination, ConversionConfig(sparsity=1))
    with pytest.raises(ValueError, match="`routers` bring their own plan"):
        convert_checkpoint(source, tmp_path / "other", ConversionConfig(), routers=tmp_path)


@pytest.mark.slow
@QUIET
def test_the_command(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    calibration = ["--calibration", text, "--windows=2", "--window-length=64"]
    result = subprocess.run(
        [
            *(sys.executable, "conversion_scripts/convert.py", source, tmp_path / "routers"),
            *("--routers-only", "--groups=3", "--window=8", "--save-plan", tmp_path / "plan.json", *calibration),
        ],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "3 of 6 groups sparse" in result.stdout and "from_pretrained(base, routers=...)" in result.stdout
    assert "Fitting routers" in result.stderr  # progress
    command.main([str(source), str(tmp_path / "converted"), "--routers", str(tmp_path / "routers")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert GroupPlan.of_config(model.config) == GroupPlan.load(tmp_path / "plan.json")
    input_ids = random_tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, load_routers(tiny_base(), tmp_path / "routers")(input_ids).logits)
    command.main(
        [str(source), str(tmp_path / "planned"), "--plan", str(tmp_path / "plan.json"), *map(str, calibration)]
    )
    assert GroupPlan.of_config(AutoModelForCausalLM.from_pretrained(tmp_path / "planned").config) == GroupPlan.load(
        tmp_path / "plan.json"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["source", "source"], "exists: remove it"),
        (["./nowhere", "new"], "nowhere does not exist"),
        (["source", "new", "--windows=0"], "`--windows` must be at least 1"),
        (["source", "new", "--groups=99"], "`--groups=99`: the model has 6 key/value groups"),
        (["source", "new", "--sparsity=0.5"], "`--sparsity` must be a finite number of at least 1"),
        (["source", "new", "--calibration", "no.jsonl"], "no.jsonl does not exist"),
        (["source", "new", "--revision=x"], "`--revision` is of a model on the Hub"),
        (["source", "new", "--plan", "missing.json"], "missing.json"),
        (["source", "new", "--plan", "broken.json"], "broken.json: Expecting"),
        (["source", "new", "--routers", "source"], "source has no mosa_config.json"),
        (
            ["source", "new", "--routers", "source", "--window=3"],
            "`--routers` bring their own plan.*leave out `--plan`",
        ),
        (
            ["source", "new", "--routers", "source", "--windows=3"],
            "`--routers` bring their own plan.*`--windows` and `--window-length`",
        ),
        (["source", "new", "--calibration", "broken.json"], "has 1 tokens, fewer than one window of 256"),
    ],
)
def test_the_command_fails_in_one_line(arguments, message, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    with pytest.raises(SystemExit, match=f"^mosa-convert: .*{message}") as caught:
        command.main(arguments)
    assert "\n" not in str(caught.value) and not Path("new").exists()


def test_what_is_to_be_typed_next_is_quoted(source, tmp_path, monkeypatch, capsys):
    """On the terminal, and in a model card, where the base's name is code as well."""
    monkeypatch.chdir(tmp_path)
    base, routers = "the base's", "c ü/x y"
    source.rename(base)
    command.main([base, routers, "--sparsity=1", "--routers-only"])
    typed = capsys.readouterr().out.partition("mosa-evaluate ")[2]
    assert shlex.split(typed)[:3] == [base, "--routers", routers]
    command.main([base, f"{routers}/z z", "--sparsity=1"])
    assert shlex.split(capsys.readouterr().out.partition("mosa-evaluate ")[2])[0] == f"{routers}/z z"
    model = load_routers(tiny_base(), routers)
    save_routers(model, "again", base_model='d:\\a "base"')
    card = Path("again", "README.md").read_text()
    typed = re.search("`mosa-evaluate (.*)`", card)[1]
    assert shlex.split(typed)[:3] == ['d:\\a "base"', "--routers", "path of this folder"]
    (call,) = [
        each for each in ast.walk(ast.parse(card.split("```python")[1].split("```")[0])) if isinstance(each, ast.Call)
    ]
    assert ast.literal_eval(call.args[0]) == 'd:\\a "base"'


def test_a_picture_that_cannot_be_drawn_is_refused_first(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^mosa-convert: A plan's picture needs matplotlib"):  # nor is there a text
        command.main([str(source), str(tmp_path / "new"), "--plot-plan", str(tmp_path / "plan.png")])


def test_short_calibration_text(source, tmp_path):
    with pytest.raises(ValueError, match="has 10 tokens, fewer than one window of 64.*`window_length`"):
        convert_checkpoint(source, tmp_path / "converted", ConversionConfig(), "ten bytes.", window_length=64)
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="(?s)no tokenizer that can be loaded.*give the calibration as token ids"):
        convert_checkpoint(source, tmp_path / "converted", ConversionConfig(), TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_windows_of_a_model_that_reads_little(tmp_path):
    """By default it reads what it can read twice; what it cannot is refused by name before weights are loaded."""
    base = tiny_base(max_position_embeddings=200)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    converted = tmp_path / "converted"
    convert_checkpoint(tmp_path / "base", converted, ConversionConfig(window=8), TEXT, routers_only=True)
    assert json.loads((converted / "mosa_config.json").read_text())["mosa_conversion"]["calibration"]["tokens"] == 100
    with pytest.raises(ValueError, match="`window_length` asks for windows of 101 tokens.* at most 100 tokens"):
        convert_checkpoint(tmp_path / "base", tmp_path / "no", ConversionConfig(window=8), TEXT, window_length=101)


@pytest.mark.parametrize(
    "conversion, given, message",
    [
        (ConversionConfig(groups=999, window=8), {}, "`groups=999`: the model has"),
        (ConversionConfig(groups=((9, 0),), window=8), {}, r"`groups` names \[\(9, 0\)\]"),
        (ConversionConfig(plan=GroupPlan.uniform(1, 2, SparseGroup(8, 4))), {}, "The plan has 1 layers"),
        (None, {"calibration": random_tokens(2, 4000)}, "`input_ids` asks for windows of 4000 tokens"),
        (None, {"calibration": random_tokens(2, 40), "num_windows": 3}, "`num_windows`.*is cut already"),
        (ConversionConfig(sparsity=1), {"calibration": None, "window_length": 3}, "`window_length`.*no text to read"),
        (None, {"calibration": None, "routers": "routers", "num_windows": 3}, "`routers` bring.*`num_windows`"),
    ],
    ids=str,
)
def test_what_weights_are_not_needed_for_is_refused_before_they_are_loaded(
    conversion, given, message, source, tmp_path, monkeypatch
):
    monkeypatch.setattr("mosa_hf.conversion.checkpoint.load_weights", None)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "converted", conversion, **{"calibration": TEXT, **given})


def test_calibration_windows_spread_over_the_text():
    windows = calibration_windows(byte_tokenizer(), TEXT, num_windows=3, window_length=100)
    everything = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])
    last = len(everything) // 100 - 1
    assert torch.equal(windows[0], everything[:100])
    assert torch.equal(windows[2], everything[last * 100 : last * 100 + 100])
    for options in ({"window_length": 0}, {"window_length": -1}, {"num_windows": 0}, {"num_windows": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be at least 1, got"):
            calibration_windows(byte_tokenizer(), TEXT, **options)


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("groups", [None, ((0, 0), (0, 1), (2, 1))], ids=["all_groups", "some_groups"])
@torch.no_grad()
def test_native_without_sparsity(groups, fields):
    """ρ = 1: the paper's heads compute what the Llama computes, on weights of their own."""
    model = tiny_base(**fields)
    native = convert_to_native(model, ConversionConfig(sparsity=1, groups=groups, window=0))
    assert type(native) is MosaForCausalLM
    input_ids = random_tokens(2, 40)
    expected = model(input_ids).logits
    assert (native(input_ids).logits - expected).abs().max() < 1e-4
    for parameter in native.parameters():
        parameter.add_(1.0)
    assert torch.equal(model(input_ids).logits, expected)


def test_native_conversion_fits_routers():
    calibration = random_tokens(6, 64)
    native = convert_to_native(tiny_base(), ConversionConfig(groups=4, sparsity=4, window=0), calibration)
    with torch.no_grad(), trace_routing(native) as selected:
        native(calibration, use_cache=False)
    assert sum(calls[0].shape[-1] for calls in selected.values()) == 4
    for calls in selected.values():
        assert 0.2 < calls[0].float().mean() < 0.35
    native.train()(calibration, labels=calibration).loss.backward()  # healing can start
    gradients = [p.grad for name, p in native.named_parameters() if "router.weight" in name]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)
    with pytest.raises(ValueError, match="weights of a LlamaForCausalLM, not of a Gemma3ForCausalLM"):
        convert_to_native(tiny_base("gemma3_text"), ConversionConfig(sparsity=1, window=0))
    with pytest.raises(ValueError, match="set `window=0`"):
        convert_to_native(tiny_base(), ConversionConfig(sparsity=1))
