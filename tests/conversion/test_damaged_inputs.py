"""500 damaged inputs of a conversion: an error that names file or field for each, and nothing written."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mosa_hf import ConversionConfig, GroupPlan, convert_checkpoint, convert_model, save_routers
from mosa_hf.modeling.group_plan import SparseGroup
from mosa_hf.modeling.router_files import LATER_FIELDS
from testing.json_files import edit_json
from testing.tiny import random_tokens, tiny_base

ROUNDS = 10
INDEX, CONFIG, ROUTERS, ROUTERS_CONFIG = (
    "model.safetensors.index.json",
    "config.json",
    "mosa_routers.safetensors",
    "mosa_config.json",
)
PLAN = GroupPlan.uniform(2, 2, SparseGroup(window=8, sparsity=1))
# What a test of each kind damages: the directory `base`, the directory `routers`, or `plan.json`. It returns what the
# error must name.
Damage = Callable[[Path, random.Random], str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pristine")
    model = tiny_base(num_hidden_layers=2, rope_parameters=None)
    model.save_pretrained(path / "base", max_shard_size="40kB")
    save_routers(convert_model(model, ConversionConfig(sparsity=4, window=8), random_tokens(2, 48)), path / "routers")
    PLAN.save(path / "plan.json")
    return path


def shard(work: Path, rng: random.Random) -> Path:
    return rng.choice(sorted((work / "base").glob("*.safetensors")))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_tensor(path: Path, rng: random.Random, edit: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Replace a random tensor of a file; its name."""
    name = rng.choice(sorted(load_file(path)))
    edit_tensors(path, lambda tensors: tensors.update({name: edit(tensors[name]).contiguous()}))
    return name


def truncate(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, rng.randrange(8), rng.randrange(len(content))])])
    return path.name


def garble_header(path: Path, rng: random.Random) -> str:
    """Another byte somewhere in what the header says of the tensors."""
    content = bytearray(path.read_bytes())
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    start, end = header.index(b"},", header.index(b"__metadata__")) + 2, header.rindex(b"}") + 1
    where = 8 + rng.randrange(start, end)
    content[where] = rng.choice([byte for byte in b'\x00\xffaZ09{}[]:,"' if byte != content[where]])
    path.write_bytes(content)
    return ""  # the file, or the tensor that it lacks now


def poison(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return tensor


def integers(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return tensor.to(rng.choice([torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool]))


def other_shape(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return rng.choice([torch.cat([tensor, tensor]), tensor[:-1], tensor[None], tensor.flatten()[:1]])


def drop_tensor(work: Path, rng: random.Random) -> str:
    name = edit_tensor(path := shard(work, rng), rng, torch.clone)
    edit_tensors(path, lambda tensors: tensors.pop(name))
    if rng.random() < 0.5:
        edit_json(work / "base" / INDEX, lambda index: index["weight_map"].pop(name))
    return name


def add_tensor(work: Path, rng: random.Random) -> str:
    path = shard(work, rng)
    name = rng.choice(
        ["lm_head.bias", "model.layers.0.self_attn.q_norm.weight", "model.layers.2.mlp.up_proj.weight", "x"]
    )
    edit_tensors(path, lambda tensors: tensors.update({name: torch.zeros(3)}))
    if listed := rng.random() < 0.5:
        edit_json(work / "base" / INDEX, lambda index: index["weight_map"].update({name: path.name}))
    return CONFIG if listed and "layers.2" in name else name


def same_tensor_twice(work: Path, rng: random.Random) -> str:
    first, second = rng.sample(sorted((work / "base").glob("*.safetensors")), 2)
    name = rng.choice(sorted(load_file(first)))
    edit_tensors(second, lambda tensors: tensors.update({name: load_file(first)[name]}))
    return name


def unlist(work: Path, rng: random.Random) -> str:
    name = rng.choice(sorted(json.loads((work / "base" / INDEX).read_text())["weight_map"]))
    edit_json(work / "base" / INDEX, lambda index: index["weight_map"].pop(name))
    return name


def list_elsewhere(work: Path, rng: random.Random) -> str:
    weight_map = json.loads((work / "base" / INDEX).read_text())["weight_map"]
    name = rng.choice(sorted(weight_map))
    other = rng.choice(sorted(set(weight_map.values()) - {weight_map[name]}))
    edit_json(work / "base" / INDEX, lambda index: index["weight_map"].update({name: other}))
    return name


def list_what_is_not_there(work: Path, rng: random.Random) -> str:
    file = rng.choice([shard(work, rng).name, "model-00099-of-00099.safetensors"])
    edit_json(work / "base" / INDEX, lambda index: index["weight_map"].update({"no.such.tensor": file}))
    return "no.such.tensor" if "99" not in file else file


def lead_outside(work: Path, rng: random.Random) -> str:
    """A file name that leaves the directory; the file exists."""
    outside = work / "outside.safetensors"
    shutil.copy(shard(work, rng), outside)
    (work / "base" / "sub").mkdir()
    shutil.copy(outside, work / "base" / "sub" / "inside.safetensors")
    names = ["../outside.safetensors", str(outside), "sub/inside.safetensors", "./../outside.safetensors", "..", "."]
    bad = rng.choice([*names, "..\\outside.safetensors", "a\0b.safetensors", "", "pytorch_model.bin"])

    def edit(index):
        index["weight_map"][rng.choice(sorted(index["weight_map"]))] = bad

    edit_json(work / "base" / INDEX, edit)
    return INDEX


def break_index(work: Path, rng: random.Random) -> str:
    bad = ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"]
    (work / "base" / INDEX).write_text(rng.choice(bad), encoding="latin-1")
    return INDEX


def remove(file: str) -> Damage:
    def damage(work: Path, rng: random.Random) -> str:
        path = shard(work, rng) if file == "shard" else work / file
        path.unlink()
        return path.name

    return damage


def break_json(file: str) -> Damage:
    def damage(work: Path, rng: random.Random) -> str:
        text = (work / file).read_text()
        cut = text[: rng.randrange(1, len(text) - 2)]
        (work / file).write_text(rng.choice([cut, "", "[]", "null", "3", "\xff", text + "}"]), encoding="latin-1")
        return Path(file).name

    return damage


def set_field(file: str, values: dict[str, list], names: str = "") -> Damage:
    """One field of a JSON file out of range; the error names the file, or else `names`."""

    def damage(work: Path, rng: random.Random) -> str:
        field = rng.choice(sorted(values))
        value = rng.choice(values[field])
        edit_json(work / file, lambda content: content.update({field: value}))
        return names or Path(file).name

    return damage


def base_tensor(edit: Callable) -> Damage:
    def damage(work: Path, rng: random.Random) -> str:
        return edit_tensor(shard(work, rng), rng, lambda tensor: edit(tensor, rng))

    return damage


def router_tensor(edit: Callable) -> Damage:
    def damage(work: Path, rng: random.Random) -> str:
        return edit_tensor(work / "routers" / ROUTERS, rng, lambda tensor: edit(tensor, rng))

    return damage


def poison_routers(work: Path, rng: random.Random) -> str:
    def edit(tensor):
        tensor = tensor.clone()
        bad = [torch.nan] if tensor.ndim == 1 else [torch.nan, torch.inf, -torch.inf]
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(bad)
        return tensor

    return edit_tensor(work / "routers" / ROUTERS, rng, edit)


def drop_router(work: Path, rng: random.Random) -> str:
    name = edit_tensor(work / "routers" / ROUTERS, rng, torch.clone)
    edit_tensors(work / "routers" / ROUTERS, lambda tensors: tensors.pop(name))
    return name


def add_router(work: Path, rng: random.Random) -> str:
    name = rng.choice(["model.layers.9.self_attn.mosa_router.weight", "lm_head.weight", "x"])
    edit_tensors(work / "routers" / ROUTERS, lambda tensors: tensors.update({name: torch.zeros(2, 32)}))
    return name


def unknown_router_field(work: Path, rng: random.Random) -> str:
    field = rng.choice(["mosa_future", "extra"])
    edit_json(work / "routers" / ROUTERS_CONFIG, lambda content: content.update({field: 1}))
    return field


def missing_router_field(work: Path, rng: random.Random) -> str:
    content = json.loads((work / "routers" / ROUTERS_CONFIG).read_text())
    field = rng.choice([name for name in content if "mosa" in name and name not in LATER_FIELDS])
    edit_json(work / "routers" / ROUTERS_CONFIG, lambda content: content.pop(field))
    return field


def plan_of_routers(work: Path, rng: random.Random) -> str:
    """A plan that names groups or layers that do not exist."""
    layers, groups = rng.choice([(2, 3), (3, 2), (1, 2), (2, 1), (0, 0), (9, 9)])
    plan = [[{"window": 8, "sparsity": 4}] * groups] * layers
    edit_json(work / "routers" / ROUTERS_CONFIG, lambda content: content.update({"mosa_plan": plan}))
    return ROUTERS_CONFIG


def plan_of_another_model(work: Path, rng: random.Random) -> str:
    layers, groups = rng.choice([(2, 3), (3, 2), (1, 2), (2, 1), (0, 0), (9, 9), (2, 100), (100, 2)])
    GroupPlan(((SparseGroup(8, 1),) * groups,) * layers).save(work / "plan.json")
    return "The plan"


def plan_with_a_bad_group(work: Path, rng: random.Random) -> str:
    layer, group = rng.randrange(2), rng.randrange(2)
    bad = [3, "dense", [], {}, {"window": 8}, {"sparsity": 2}, {"window": 8, "sparsity": 1, "rate": 2}]
    bad += [{"window": window, "sparsity": 1} for window in (-1, 0.5, "8", None, True, [])]
    bad += [
        {"window": 8, "sparsity": sparsity} for sparsity in (0, 0.99, -1, "8", None, True, float("nan"), float("inf"))
    ]
    edit_json(work / "plan.json", lambda plan: plan["layers"][layer].__setitem__(group, rng.choice(bad)))
    return f"Layer {layer}, group {group}"


def plan_of_dense_groups(work: Path, rng: random.Random) -> str:
    edit_json(work / "plan.json", lambda plan: plan.update(layers=[[None, None]] * 2))
    return "plan"


SIZES = [0, -1, 7, 31, 64, "32", 32.5, None, [], 10**30]
CONFIG_FIELDS = {
    "hidden_size": SIZES,
    "intermediate_size": [0, -1, 47, 4800, "48", 48.5, [], 10**30],
    "num_hidden_layers": [0, -1, 1, 3, "2", 10**9, [], 2.5],
    "num_attention_heads": [0, -1, 3, 8, "4", 4.5, []],
    "num_key_value_heads": [0, -1, 3, 4, 1, "2", 2.5, []],
    "head_dim": [0, -1, 7, 16, "8", 8.5, []],
    "vocab_size": [0, -1, 255, 257, "256", 10**30, []],
    "hidden_act": ["nope", 3, None],
    "model_type": ["nope", "gpt2", "", None, 3, "mosa_llama", "bert"],
    "architectures": [["GPT2LMHeadModel"], ["Nope"]],
    "tie_word_embeddings": ["maybe", 7, []],
    "attention_bias": ["maybe", False, []],
    "rms_norm_eps": ["small", [], {}],
    "max_position_embeddings": ["many", [], 1.5],
}
ROUTER_FIELDS = {
    "mosa_window": [-1, 1.5, "8", None, []],
    "mosa_sparsity": [0, 0.5, -3, "4", None, float("nan"), float("inf")],
    "mosa_plan": [3, "all", [[3]], [[{}]], {"layers": []}],
    "mosa_routing": ["nope", 3, None],
    "mosa_inference_routing": ["nope", None],
    "mosa_include_first": ["yes", None, 3],
    "mosa_min_tokens": [0, -1, 1.5],
    "mosa_cache_budget": [0, -5, 1.5],
    "mosa_threshold_momentum": [1.5, -0.5, "0.9"],
    "mosa_gate_slope": [-1, float("nan"), "1"],
    "mosa_router_bias": ["yes", 3],
    "mosa_router_hidden_size": [0, -1, 8, 1.5, "8"],
    "num_hidden_layers": [1, 3, None],
    "num_groups": [1, 4, "2"],
    "hidden_size": [31, 64, None],
    "model_type": ["mosa_qwen3", "llama", None],
}
# name → what is converted ("routers": with ready ones; "plan": with a plan; None: alike), damage.
DAMAGES: dict[str, tuple[str | None, Damage]] = {
    "shard truncated": (None, lambda work, rng: truncate(shard(work, rng), rng)),
    "shard truncated, routers": ("routers", lambda work, rng: truncate(shard(work, rng), rng)),
    "shard header": (None, lambda work, rng: garble_header(shard(work, rng), rng)),
    "shard header, routers": ("routers", lambda work, rng: garble_header(shard(work, rng), rng)),
    "shard missing": (None, remove("shard")),
    "tensor dtype": (None, base_tensor(integers)),
    "tensor dtype, routers": ("routers", base_tensor(integers)),
    "tensor shape": (None, base_tensor(other_shape)),
    "tensor shape, routers": ("routers", base_tensor(other_shape)),
    "tensor not finite": (None, base_tensor(poison)),
    "tensor not finite, routers": ("routers", base_tensor(poison)),
    "tensor missing": (None, drop_tensor),
    "tensor missing, plan": ("plan", drop_tensor),
    "tensor extra": (None, add_tensor),
    "tensor extra, routers": ("routers", add_tensor),
    "tensor twice": (None, same_tensor_twice),
    "index broken": (None, break_index),
    "index broken, routers": ("routers", break_index),
    "index lacks an entry": (None, unlist),
    "index lacks an entry, routers": ("routers", unlist),
    "index names another file": (None, list_elsewhere),
    "index names what is not there": (None, list_what_is_not_there),
    "index leads outside": (None, lead_outside),
    "index leads outside, routers": ("routers", lead_outside),
    "index leads outside, plan": ("plan", lead_outside),
    "index missing": (None, lambda work, rng: remove(f"base/{INDEX}")(work, rng) and "no safetensors weights"),
    "config field": (None, set_field("base/config.json", CONFIG_FIELDS)),
    "config field, routers": ("routers", set_field("base/config.json", CONFIG_FIELDS)),
    "config field, plan": ("plan", set_field("base/config.json", CONFIG_FIELDS)),
    "config broken": (None, break_json("base/config.json")),
    "config missing": ("routers", remove("base/config.json")),
    "routers truncated": ("routers", lambda work, rng: truncate(work / "routers" / ROUTERS, rng)),
    "routers header": ("routers", lambda work, rng: garble_header(work / "routers" / ROUTERS, rng)),
    "routers missing": ("routers", remove(f"routers/{ROUTERS}")),
    "routers dtype": ("routers", router_tensor(integers)),
    "routers shape": ("routers", router_tensor(other_shape)),
    "routers not finite": ("routers", poison_routers),
    "router missing": ("routers", drop_router),
    "router extra": ("routers", add_router),
    "routers config missing": ("routers", remove(f"routers/{ROUTERS_CONFIG}")),
    "routers config broken": ("routers", break_json(f"routers/{ROUTERS_CONFIG}")),
    "routers config field": ("routers", set_field(f"routers/{ROUTERS_CONFIG}", ROUTER_FIELDS)),
    "routers config field again": ("routers", set_field(f"routers/{ROUTERS_CONFIG}", ROUTER_FIELDS)),
    "routers config unknown field": ("routers", unknown_router_field),
    "routers config lacks a field": ("routers", missing_router_field),
    "routers plan": ("routers", plan_of_routers),
    "plan of another model": ("plan", plan_of_another_model),
    "plan broken": ("plan", break_json("plan.json")),
    "plan group": ("plan", plan_with_a_bad_group),
    "plan group again": ("plan", plan_with_a_bad_group),
    "plan missing": ("plan", remove("plan.json")),
    "plan dense": ("plan", plan_of_dense_groups),
}


def test_there_are_500():
    assert len(DAMAGES) * ROUNDS >= 500


def convert(kind: str | None, work: Path) -> None:
    if kind == "routers":
        convert_checkpoint(work / "base", work / "converted", routers=work / "routers")
    else:
        fields = {"plan": work / "plan.json"} if kind == "plan" else {"sparsity": 1}
        convert_checkpoint(work / "base", work / "converted", ConversionConfig(**fields))


@pytest.mark.parametrize("kind", ["routers", "plan", None])
def test_undamaged(kind, pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "work")
    convert(kind, tmp_path / "work")
    assert (tmp_path / "work" / "converted" / CONFIG).is_file()


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged(name, pristine, tmp_path):
    kind, damage = DAMAGES[name]
    for number in range(ROUNDS):
        work = tmp_path / str(number)
        shutil.copytree(pristine, work)
        named = damage(work, random.Random(f"{name} {number}"))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            convert(kind, work)
        message = str(caught.value)
        assert named in message and ("safetensors" in message or "json" in message or "plan" in message), (
            number,
            message,
        )
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, number
