"""Checkpoints: the base's files and a file of routers, on disk, on the fly, from routers alone, and back."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.initialization import no_init_weights

import mosa_hf
from benchmarks.metrics import formula_bytes
from mosa_hf import (
    ConversionConfig,
    GroupPlan,
    MosaLlamaForCausalLM,
    cache_bytes,
    convert_checkpoint,
    convert_model,
    load_routers,
    save_routers,
    to_dense,
    trace_routing,
)
from mosa_hf.evaluation import filled_cache
from mosa_hf.modeling.group_plan import SparseGroup
from mosa_hf.modeling.kv_share import planned_bytes
from testing.tiny import byte_tokenizer, random_tokens, tiny_base

from ..conftest import slow_but

# Llama's names; others, one of which changes on disk; a layer with a sliding window; fused projections; experts, which
# are tensor by tensor on disk.
FAMILIES = ("llama", "gpt_neox", "gemma3_text", "phi3", "mixtral")
CONVERSION = ConversionConfig(sparsity=4, window=8)
TEXT = random_tokens(3, 48)
PROMPT = random_tokens(2, 40, seed=1)
NEAR, FAR = SparseGroup(window=20, sparsity=6), SparseGroup(window=4, sparsity=2.5)
PLAN = GroupPlan(((None, NEAR), (FAR, NEAR), (None, None)))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(PROMPT).logits


@pytest.fixture
def base(tmp_path) -> Path:
    """A Llama in several shards, without a tokenizer."""
    tiny_base().save_pretrained(tmp_path / "base", max_shard_size="30kB")
    return tmp_path / "base"


@pytest.fixture
def routers(tmp_path) -> Path:
    """Routers for it."""
    save_routers(convert_model(tiny_base(), CONVERSION, TEXT), tmp_path / "routers")
    return tmp_path / "routers"


@pytest.mark.parametrize(
    "tied, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=["untied", "tied, bfloat16"]
)
@pytest.mark.parametrize("family", slow_but(["llama", "mixtral"], FAMILIES))
def test_all_ways_give_the_same_logits(family, tied, dtype, tmp_path):
    model = tiny_base(family, tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="20kB" if tied else "5GB")
    model = type(model).from_pretrained(tmp_path / "base")  # `to(dtype)` has rounded the rotary frequencies
    in_memory = convert_model(model, CONVERSION, TEXT)
    expected = logits_of(in_memory)
    assert (expected - logits_of(model)).abs().max() > 0.1  # something was selected

    convert_checkpoint(tmp_path / "base", tmp_path / "converted", CONVERSION, TEXT)
    save_routers(in_memory, tmp_path / "routers")
    convert_checkpoint(tmp_path / "base", tmp_path / "from_routers", routers=tmp_path / "routers")
    ways = {
        "on disk": AutoModelForCausalLM.from_pretrained(tmp_path / "converted"),
        "on disk, from routers": AutoModelForCausalLM.from_pretrained(tmp_path / "from_routers"),
        "on the fly": type(in_memory).from_pretrained(tmp_path / "base", routers=tmp_path / "routers"),
        "routers alone": load_routers(model, tmp_path / "routers"),
    }
    for way, other in ways.items():
        assert type(other) is type(in_memory) and other.dtype == dtype, way
        assert torch.equal(logits_of(other), expected), way
        assert not other.training and not any(module.training for module in other.modules())
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 1 or not tied
    for directory in ("converted", "from_routers"):
        links = sorted((tmp_path / directory).glob("model-base-*.safetensors"))
        assert [link.read_bytes() for link in links] == [shard.read_bytes() for shard in shards]
        assert all(map(os.path.samefile, links, shards))

    # And back.
    dense = to_dense(ways["on disk"])
    assert type(dense) is type(model) and torch.equal(logits_of(dense), logits_of(model))
    settings, expected = dense.config.to_dict(), type(model).from_pretrained(tmp_path / "base").config.to_dict()
    assert {name for name in settings.keys() | expected.keys() if settings.get(name) != expected.get(name)} <= {
        "_name_or_path",
        "architectures",
    }


def test_nothing_is_copied_in_memory():
    model = tiny_base()
    converted = convert_model(model, CONVERSION, TEXT)
    tensors = dict(converted.named_parameters())
    for name, parameter in model.named_parameters():
        assert tensors.pop(name).data_ptr() == parameter.data_ptr()
    assert all(".mosa_router." in name for name in tensors)
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert held == {name: parameter.data_ptr() for name, parameter in to_dense(converted).named_parameters()}
    assert type(model) is LlamaForCausalLM and not hasattr(model.config, "mosa_window")


def test_offloaded_weights_are_shared_too():
    """All of them are in memory that Accelerate's hooks read."""
    model = tiny_base()
    expected = logits_of(convert_model(model, CONVERSION, TEXT))
    cpu_offload(model, execution_device=torch.device("cpu"))
    converted = convert_model(model, CONVERSION, TEXT)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    assert torch.equal(logits_of(converted), expected)
    for each in (converted, to_dense(converted)):
        held = [own.model.layers[0].mlp.up_proj._hf_hook.weights_map["weight"] for own in (model, each)]
        assert held[0].data_ptr() == held[1].data_ptr()
    cache = filled_cache(converted, PROMPT[:1])
    assert cache.get_seq_length() == PROMPT.shape[1]


@pytest.mark.parametrize("head", [None, "ForSequenceClassification"])
def test_heads(head, tmp_path):
    model = tiny_base(head=head)
    model.save_pretrained(tmp_path / "base")
    in_memory = convert_model(model, CONVERSION, TEXT)
    convert_checkpoint(tmp_path / "base", tmp_path / "converted", CONVERSION, TEXT)
    save_routers(in_memory, tmp_path / "routers")
    for other in (
        type(in_memory).from_pretrained(tmp_path / "converted"),
        type(in_memory).from_pretrained(tmp_path / "base", routers=tmp_path / "routers"),
    ):
        with torch.no_grad():
            assert torch.equal(other(PROMPT)[0], in_memory(PROMPT)[0])
    code = (tmp_path / "converted" / "README.md").read_text().split("```")[1].removeprefix("python")
    names: dict = {}
    exec(code.replace("path of this folder", str(tmp_path / "converted")), names)
    assert type(names["model"]) is type(in_memory)
    if head:
        auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "converted")
        assert type(auto) is type(in_memory)


def test_routers_do_not_depend_on_the_head(tmp_path):
    model = tiny_base()
    save_routers(convert_model(model.model, CONVERSION, TEXT), tmp_path / "routers")
    assert torch.equal(
        logits_of(load_routers(model, tmp_path / "routers")), logits_of(convert_model(model, CONVERSION, TEXT))
    )


def test_routers_are_fitted_in_another_dtype(base, tmp_path):
    """Which the files do not get, nor the config that says how they are loaded."""
    for name, options in {"own": {}, "half": {"dtype": "bfloat16", "device_map": "cpu"}}.items():
        convert_checkpoint(base, tmp_path / name, CONVERSION, TEXT, **options)
    own, half = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("own", "half"))
    assert half.dtype == torch.float32 and half.config.dtype == torch.float32
    weights = [torch.cat([each.weight for each in model.mosa_routers().values()]) for model in (own, half)]
    assert 1e-6 < (weights[0] - weights[1]).abs().max() < 0.1 * weights[0].abs().max()


def test_bytes_of_a_plan_are_those_of_a_cache(base, tmp_path):
    """As far as routers select what the plan says: of the calibration text."""
    convert_checkpoint(base, tmp_path / "converted", CONVERSION, TEXT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    before, after = planned_bytes(model.config, TEXT.shape[1])
    assert before == sum(cache_bytes(filled_cache(to_dense(model), TEXT[:1])).values())
    held = [formula_bytes(model, row[None]) for row in TEXT]  # what routers select, without positions and free room
    assert sum(held) / len(held) == pytest.approx(after, rel=0.1)


def test_plans_in_every_form(base, tmp_path):
    """Windows and rates differ by group, and thresholds follow each group's own rate."""
    PLAN.save(tmp_path / "plan.json")
    conversion = ConversionConfig(plan=tmp_path / "plan.json")
    in_memory = convert_model(tiny_base(), conversion, TEXT)
    convert_checkpoint(base, tmp_path / "converted", ConversionConfig(plan=PLAN), TEXT)
    convert_checkpoint(base, tmp_path / "routers", conversion, TEXT, routers_only=True)
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    on_the_fly = MosaLlamaForCausalLM.from_pretrained(base, routers=tmp_path / "routers")
    for model in (in_memory, on_disk, on_the_fly):
        assert torch.equal(logits_of(model), logits_of(in_memory))
        assert tuple(model.config.groups_of_layer(layer) for layer in range(3)) == PLAN.layers
        assert model.mosa_routers().keys() == {0, 1}
        assert not any(router.weight.requires_grad for router in model.mosa_routers().values())
    with torch.no_grad(), trace_routing(on_disk) as selected:
        on_disk(TEXT, use_cache=False)
    rates = [selected[layer][0][:, 1:].float().mean((0, 1)) for layer in sorted(selected)]
    for rate, sparsity in zip(torch.cat(rates), (6, 2.5, 6), strict=True):
        assert abs(rate * sparsity - 1) < 0.15


def test_tokenizer_and_generation_config_come_along(base, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    for name in ("LICENSE", "training_args.bin", "notes.py"):
        (base / name).write_text(name)
    convert_checkpoint(base, tmp_path / "converted", ConversionConfig(sparsity=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert model.generation_config.temperature == 0.5
    loaded = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert loaded("hello")["input_ids"] == tokenizer("hello")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert torch.equal(logits_of(model), logits_of(tiny_base()))
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    assert "LICENSE" in names and not names & {"training_args.bin", "notes.py"}


def test_files_of_every_tokenizer_come_along(base, routers, tmp_path):
    """Those that Transformers' tokenizers of decoders name, what Mistral's are shipped as, and code of one's own."""
    files = {"vocab.json", "merges.txt", "emoji.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
    files |= {"tekken.json", "qwen.tiktoken", "tokenization_own.py"}
    for name in files:
        (base / name).write_text("{}")
    convert_checkpoint(base, tmp_path / "converted", routers=routers)
    assert not files - {path.name for path in (tmp_path / "converted").iterdir()}


def test_routers_folder(base, routers, tmp_path):
    assert {path.name for path in routers.iterdir()} == {"README.md", "mosa_config.json", "mosa_routers.safetensors"}
    other = tmp_path / "published"
    save_routers(MosaLlamaForCausalLM.from_pretrained(base, routers=routers), other, base_model="someone/their-model")
    card = (other / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/their-model\n") and "9 of 9" not in card and "6 of 6" in card
    assert json.loads((other / "mosa_config.json").read_text())["base_model"] == "someone/their-model"
    assert (other / "mosa_routers.safetensors").read_bytes() == (routers / "mosa_routers.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="exists: remove it"):
        save_routers(convert_model(tiny_base(), CONVERSION, TEXT), other)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no sparse groups"):
        save_routers(tiny_base(), tmp_path / "none")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no sparse groups"):
        to_dense(tiny_base())


@pytest.mark.parametrize("umask, mode", [(0o022, 0o755), (0o077, 0o700)], ids=oct)
def test_folders_are_as_private_as_the_user_wants(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_routers(convert_model(tiny_base(), CONVERSION, TEXT), tmp_path / "routers")
    finally:
        os.umask(before)
    assert (tmp_path / "routers").stat().st_mode & 0o777 == mode


def test_a_plan_without_sparse_groups_has_no_routers_to_save(tmp_path):
    dense = GroupPlan(((None, None),) * 3)
    model = MosaLlamaForCausalLM(mosa_hf.MosaLlamaConfig.from_base(tiny_base().config, mosa_plan=dense.to_list()))
    with pytest.raises(ValueError, match="`mosa_plan` leaves every group dense.*`mosa_hf.to_dense"):
        save_routers(model, tmp_path / "routers")
    assert not list(tmp_path.glob("routers*"))


def test_routers_replace_routers(routers, tmp_path):
    other = convert_model(tiny_base(), ConversionConfig(plan=PLAN), TEXT)
    loaded = load_routers(other, routers / "mosa_routers.safetensors")
    assert torch.equal(logits_of(loaded), logits_of(convert_model(tiny_base(), CONVERSION, TEXT)))
    assert loaded.config.mosa_plan != other.config.mosa_plan == PLAN.to_list()
    other.save_pretrained(tmp_path / "other")
    from_disk = MosaLlamaForCausalLM.from_pretrained(tmp_path / "other", routers=routers)
    assert torch.equal(logits_of(from_disk), logits_of(loaded))


def test_fields_that_are_set_on_loading(base, routers, tmp_path):
    convert_checkpoint(base, tmp_path / "converted", routers=routers)
    ways = {
        "converted": lambda **fields: AutoModelForCausalLM.from_pretrained(tmp_path / "converted", **fields),
        "routers": lambda **fields: MosaLlamaForCausalLM.from_pretrained(base, routers=routers, **fields),
    }
    plan = GroupPlan.of_config(ways["routers"]().config)
    wide = plan.with_sparse({pair: NEAR for pair in plan.sparse_pairs()})
    for load in ways.values():
        assert load(mosa_cache_budget=7).model.layers[0].self_attn.mosa_budget == 7
        assert GroupPlan.of_config(load(mosa_plan=wide.to_list()).config) == wide
        for field, value in {"mosa_cache_budget": 0, "mosa_gate_slope": -1.0, "mosa_threshold_momentum": 2}.items():
            with pytest.raises((StrictDataclassError, ValueError), match=f"`{field}` must be .*got {value}"):
                load(**{field: value})
        with pytest.raises(ValueError, match="`mosa_window` and `mosa_sparsity` would change nothing: .*`mosa_plan`"):
            load(mosa_sparsity=3, mosa_window=20)
        alike = load(mosa_plan=None, mosa_window=20)
        assert GroupPlan.of_config(alike.config).layers[0][0].window == 20
    with pytest.raises(ValueError, match="window: no such field; there are .*mosa_window"):
        load_routers(tiny_base(), routers, window=20)


def test_routers_for_a_model_with_adapters(routers):
    """A PEFT model is refused, and each of the ways that the error names gives routers and adapter."""
    adapted = get_peft_model(tiny_base(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    again = get_peft_model(load_routers(tiny_base(), routers), LoraConfig(target_modules="all-linear"))
    for model in (adapted, again):
        with pytest.raises(
            ValueError, match=r"`model` is a PEFT model .*`model.get_base_model\(\)`.*merge_and_unload"
        ):
            load_routers(model, routers)
    set_peft_model_state_dict(again, get_peft_model_state_dict(adapted))
    expected = logits_of(again.eval())
    assert (expected - logits_of(load_routers(tiny_base(), routers))).abs().max() > 1e-2
    assert torch.equal(logits_of(load_routers(adapted.get_base_model(), routers)), expected)
    merged = logits_of(load_routers(adapted.merge_and_unload(), routers))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-3)


def test_routers_of_another_model(base, routers, tmp_path):
    with pytest.raises(ValueError, match="mosa_config.json: these routers are of another model; `model_type`"):
        load_routers(tiny_base("gemma3_text"), routers)
    with pytest.raises(ValueError, match="of another model; `num_groups` of this one is 4"):
        load_routers(tiny_base(num_key_value_heads=4), routers)
    with pytest.raises(FileNotFoundError, match="has no mosa_config.json: give a folder that `save_routers` wrote"):
        load_routers(tiny_base(), base)
    with pytest.raises(FileNotFoundError, match="nowhere has no mosa_config.json"):
        load_routers(tiny_base(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'llama' model, but MosaGemma3ForCausalLM needs a 'gemma3_text' model"):
        mosa_hf.MosaGemma3ForCausalLM.from_pretrained(base, routers=routers)
    for nothing in (5, ""):
        with pytest.raises(ValueError, match=f"`routers` must be a string or a path, got {nothing!r}"):
            mosa_hf.MosaLlamaForCausalLM.from_pretrained(base, routers=nothing)
    convert_checkpoint(base, tmp_path / "converted", routers=routers)
    with pytest.raises(ValueError, match="is a converted one already: convert its base"):
        convert_checkpoint(tmp_path / "converted", tmp_path / "again", routers=routers)


def test_loading_options(base, routers, tmp_path):
    """`from_pretrained` passes on what users give: dtype, attention, offloading to disk."""
    expected = logits_of(MosaLlamaForCausalLM.from_pretrained(base, routers=routers))
    model, info = MosaLlamaForCausalLM.from_pretrained(
        base, routers=routers, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager" and not info["missing_keys"]
    assert all(router.weight.dtype == torch.float32 for router in model.mosa_routers().values())
    assert torch.equal(logits_of(MosaLlamaForCausalLM.from_pretrained(base, routers=routers, config=base)), expected)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    offloaded = MosaLlamaForCausalLM.from_pretrained(base, routers=routers, **options)
    assert offloaded.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    assert torch.equal(logits_of(offloaded), expected)
    dense = LlamaForCausalLM.from_pretrained(base, **options)
    assert torch.equal(logits_of(convert_model(dense, CONVERSION, TEXT)), expected)
    assert torch.equal(logits_of(to_dense(offloaded)), logits_of(dense))


def test_copies_where_nothing_can_be_linked(base, routers, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    convert_checkpoint(base, tmp_path / "converted", routers=routers)
    for copy, shard in zip(
        sorted((tmp_path / "converted").glob("model-base-*")), sorted(base.glob("*.safetensors")), strict=True
    ):
        assert copy.read_bytes() == shard.read_bytes() and not copy.samefile(shard)


def test_symbolic_links_are_followed(base, routers, tmp_path):
    """As in the cache of the Hub."""
    (tmp_path / "snapshot").mkdir()
    for file in base.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    convert_checkpoint(tmp_path / "snapshot", tmp_path / "converted", routers=routers)
    assert not any(file.is_symlink() for file in (tmp_path / "converted").iterdir())
    assert logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "converted")).isfinite().all()


def test_saving_over_a_converted_folder_spares_the_base(base, routers, tmp_path):
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    convert_checkpoint(base, tmp_path / "converted", routers=routers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    expected = logits_of(model)
    for size in ("30kB", "5GB"):
        model.save_pretrained(tmp_path / "converted", max_shard_size=size)
        assert {file.name: file.read_bytes() for file in base.iterdir()} == before
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "converted")), expected)


LOAD = """
import os, sys, traceback
import peft, transformers  # which takes longest, once for all forks

class Hidden:
    def find_spec(name, path=None, target=None):
        if name == "mosa_hf":
            raise ImportError("No module named 'mosa_hf'")

def load(path, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    model.save_pretrained(path + "-again")
    return type(model).__name__

def in_a_fork(name, hidden, path, **options):
    assert "mosa_hf" not in sys.modules
    process = os.fork()
    if process == 0:
        if hidden:
            sys.meta_path.insert(0, Hidden)
        try:
            outcome = load(path, **options)
        except Exception:
            outcome = traceback.format_exc()
        with open(sys.argv[2] + "/" + name, "w") as file:
            file.write(outcome)
        os._exit(0)
    os.waitpid(process, 0)

folder = sys.argv[1]
in_a_fork("untrusted", False, folder)
in_a_fork("missing", True, folder, trust_remote_code=True)
in_a_fork("trusted", False, folder, trust_remote_code=True)
in_a_fork("again", False, folder + "-again", trust_remote_code=True)
"""


@pytest.mark.slow
def test_a_converted_folder_without_importing_the_package(base, routers, tmp_path):
    """It loads with `trust_remote_code=True`, also when saved again; else an error says so, or what to install."""
    folder, outcomes = tmp_path / "converted", tmp_path / "outcomes"
    convert_checkpoint(base, folder, routers=routers)
    assert "pip install mosa-hf" in (folder / "README.md").read_text()
    outcomes.mkdir()
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", LOAD, folder, outcomes]
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
    untrusted = (outcomes / "untrusted").read_text()
    assert untrusted.startswith("Traceback") and "pass the argument `trust_remote_code=True`" in untrusted
    missing = (outcomes / "missing").read_text()
    assert missing.startswith("Traceback") and "Run `pip install mosa_hf`" in missing
    for name in ("trusted", "again"):
        assert (outcomes / name).read_text() == "MosaLlamaForCausalLM"


# What touches the file system, as Python reports it to audit hooks.
EVENTS = ("open", "os.link", "os.rename", "os.mkdir", "os.chmod", "shutil.copyfile", "tempfile.mkdtemp", "os.listdir")


def converts_until(event: int, *args, **kwargs) -> int | None:
    """Convert in a process that dies at the given event; the number of events if it lives."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        count = 0

        def hook(name, arguments):
            nonlocal count
            if name in EVENTS:
                count += 1
                if count == event:
                    os.kill(os.getpid(), 9)

        sys.addaudithook(hook)
        try:
            convert_checkpoint(*args, **kwargs)
            os.write(write, str(count).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(process, 0)
    with os.fdopen(read) as pipe:
        number = pipe.read()
    return int(number) if number else None


@pytest.mark.slow
def test_killed_at_any_point(base, routers, tmp_path):
    """No destination, or a whole one; and the next attempt succeeds."""
    expected = logits_of(MosaLlamaForCausalLM.from_pretrained(base, routers=routers))
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    num_events = converts_until(-1, base, tmp_path / "whole", routers=routers)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert num_events >= 10 and torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), expected
    )
    outcomes = set()
    for event in range(1, num_events + 1):
        destination = tmp_path / "work" / str(event)
        assert converts_until(event, base, destination, routers=routers) is None
        outcomes.add(destination.exists())
        if destination.exists():
            assert {file.name: file.read_bytes() for file in destination.iterdir()} == whole
        for leftover in (tmp_path / "work").glob(f".{event}.*"):  # what no one would load does not load either
            if {file.name for file in leftover.iterdir()} != whole.keys():
                with pytest.raises((OSError, ValueError)):
                    AutoModelForCausalLM.from_pretrained(leftover)
    assert False in outcomes
    convert_checkpoint(base, tmp_path / "work" / "1", routers=routers)
    assert {file.name: file.read_bytes() for file in (tmp_path / "work" / "1").iterdir()} == whole
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing(error, base, routers, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise error("stop")

    monkeypatch.setattr("mosa_hf.conversion.checkpoint.save_file", interrupt)
    with pytest.raises(error):
        convert_checkpoint(base, tmp_path / "converted", routers=routers)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "routers"}


PEAK = """
import re, sys
from pathlib import Path
import mosa_hf

def kilobytes(name):
    return int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
before = kilobytes("VmRSS")
mosa_hf.convert_checkpoint(sys.argv[1], sys.argv[2], routers=sys.argv[3])
print((kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.slow  # a large file
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_a_large_checkpoint(tmp_path):
    """4 GB in 8 shards, whose files are sparse: the tensors' numbers are holes that read as zeros."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(
        vocab_size=32000, num_hidden_layers=32, **shape, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    with torch.device("meta"), no_init_weights():
        model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "base")
    shards = write_sparse_shards(tmp_path / "base", model, num_shards=8)
    assert sum(shard.stat().st_size for shard in shards) > 4e9
    weights = {}
    for layer in range(32):
        name = f"model.layers.{layer}.self_attn.mosa_router."
        weights |= {name + "weight": torch.ones(8, 2048), name + "threshold": torch.zeros(8)}
    small = convert_model(tiny_base(), ConversionConfig(sparsity=1))
    save_routers(small, tmp_path / "routers")
    save_file(weights, tmp_path / "routers" / "mosa_routers.safetensors")
    settings = json.loads((tmp_path / "routers" / "mosa_config.json").read_text())
    settings |= {"num_hidden_layers": 32, "num_groups": 8, "hidden_size": 2048, "mosa_sparsity": 8}
    (tmp_path / "routers" / "mosa_config.json").write_text(json.dumps(settings))
    arguments = [tmp_path / "base", tmp_path / "converted", tmp_path / "routers"]
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 0, result.stderr
    assert 0 < float(result.stdout) < 300
    links = sorted((tmp_path / "converted").glob("model-base-*"))
    assert all(link.samefile(shard) for link, shard in zip(links, shards, strict=True))
    routers = load_file(tmp_path / "converted" / "mosa_routers.safetensors")
    assert routers.keys() == weights.keys() and all(torch.equal(routers[name], weights[name]) for name in weights)


def write_sparse_shards(directory: Path, model: torch.nn.Module, num_shards: int) -> list[Path]:
    """Safetensors files of bfloat16 zeros and an index; the zeros take no room on disk."""
    tensors = list(model.state_dict().items())
    size = -(-len(tensors) // num_shards)
    shards, weight_map = [], {}
    for number in range(num_shards):
        path = directory / f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        header, offset = {}, 0
        for name, tensor in tensors[number * size : (number + 1) * size]:
            end = offset + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            weight_map[name], offset = path.name, end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + offset)
        shards.append(path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards


def test_pickles_are_refused(base, tmp_path, monkeypatch):
    tensors = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        file.unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    with pytest.raises(ValueError, match="pickled weights only, which can run code.*`save_pretrained`"):
        convert_checkpoint(base, tmp_path / "converted", CONVERSION, TEXT)


@pytest.fixture
def int8():
    pytest.importorskip("torchao", minversion="0.18")  # what 0.16 makes, Transformers does not save
    import torchao.quantization as quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def test_quantised_bases(int8, tmp_path):
    """torchao's int8 weights convert and generate without being dequantised, in memory, on the fly and on disk."""
    tiny_base().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=int8, dtype=torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight).__module__.startswith("torchao")
    converted = convert_model(model, CONVERSION, TEXT)
    assert converted.model.layers[0].self_attn.q_proj.weight is weight
    save_routers(converted, tmp_path / "routers")
    expected, tokens = logits_of(converted), converted.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert (
        1e-3 < (expected - logits_of(load_routers(tiny_base(), tmp_path / "routers"))).abs().max()
    )  # it is quantised

    on_the_fly = MosaLlamaForCausalLM.from_pretrained(
        tmp_path / "base", routers=tmp_path / "routers", quantization_config=int8, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "int8")
    convert_checkpoint(tmp_path / "int8", tmp_path / "converted", routers=tmp_path / "routers")
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    for other in (on_the_fly, on_disk):
        assert type(other.model.layers[0].self_attn.q_proj.weight) is type(weight)
        assert torch.equal(logits_of(other), expected)
        assert torch.equal(other.generate(PROMPT, max_new_tokens=8, do_sample=False), tokens)
