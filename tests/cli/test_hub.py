"""The commands and a Hub, served on loopback: convert by name, push, load by names, and all of it offline after."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM

from testing.tiny import byte_tokenizer, tiny_base

from ..hub import TOKEN, Hub, serving
from ..tools.test_quantisation import write_gguf

pytestmark = pytest.mark.slow  # processes, each with commands of its own
BASE, ROUTERS, MODEL = "someone/base", "someone/base-routers", "someone/base-sparse"
CARD = "---\nlicense: other\nlicense_name: free-for-all\nlanguage: en\n---\n# A model\n"
SETTINGS = "--windows 2 --window-length 64 --window 8 --device cpu".split()

COMMANDS = """
import json, sys
from mosa_hf.cli.convert import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stop:
        print("stopped:", stop)
"""
LOAD = """
import torch
import mosa_hf
from mosa_hf import MosaLlamaForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

models = [
    MosaLlamaForCausalLM.from_pretrained("someone/base", routers="someone/base-routers"),
    AutoModelForCausalLM.from_pretrained("someone/base-sparse"),
]
ids = torch.tensor([AutoTokenizer.from_pretrained("someone/base-sparse")("A boat left the harbour.")["input_ids"]])
with torch.no_grad():
    logits = [model(ids).logits for model in models]
torch.save({"logits": logits, "ids": ids}, sys.argv[2])
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A directory in which the commands have run against the Hub, and what they printed."""
    folder = tmp_path_factory.mktemp("hub")
    base = tiny_base()
    base.save_pretrained(folder / "base", max_shard_size="30kB")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text(CARD)
    (folder / "base" / "pytorch_model.bin").write_text("no one should fetch this")
    (folder / "base" / "consolidated.safetensors").write_text("nor this")
    hub = Hub()
    hub.add(BASE, folder / "base")
    hub.add("someone/gated", folder / "base")
    hub.gated.add("someone/gated")
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "tiny.gguf")
    hub.add("someone/gguf", folder / "gguf")
    hub.repositories["someone/pickles"] = {"config.json": (folder / "base" / "config.json").read_bytes()}
    commands = [
        [BASE, str(folder / "routers"), "--routers-only", "--push-to-hub", ROUTERS, *SETTINGS, "--dtype", "float32"],
        [BASE, str(folder / "model"), "--routers", ROUTERS, "--push-to-hub", MODEL],
        ["someone/gguf/tiny.gguf", str(folder / "of_gguf"), *SETTINGS],
        [BASE, str(folder / "none"), "--revision", "nothing"],
        [BASE, str(folder / "none"), "--token", "hf_of_nobody", "--push-to-hub", ROUTERS],
        [BASE, str(folder / "none"), "--push-to-hub", "no/such/name", "--calibration", "read.later"],
        [BASE, str(folder / "none"), "--routers", ROUTERS, "--calibration", "read.later"],
        ["someone/nothing", str(folder / "none")],
        ["someone/pickles", str(folder / "none")],
        ["someone/gated", str(folder / "none"), "--token", "hf_of_nobody"],
        ["someone/gated", str(folder / "gated"), "--token", TOKEN, "--sparsity", "1"],
    ]
    with serving(hub):
        environment = hub.environment(folder / "cache")
        done = python(COMMANDS + LOAD, json.dumps(commands), str(folder / "online.pt"), **environment)
    later = [[BASE, str(folder / "again"), "--routers", ROUTERS], ["someone/other", str(folder / "none")]]
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    again = python(COMMANDS + LOAD, json.dumps(later), str(folder / "offline.pt"), **offline)
    (folder / "printed").write_text(done.stdout)
    (folder / "offline").write_text(again.stdout)
    (folder / "said").write_text(done.stderr)
    (folder / "fetched").write_text("\n".join(path for method, path in hub.requests if method == "GET"))
    for name in (ROUTERS, MODEL):
        for path, content in hub.repositories[name].items():
            (folder / "pushed" / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "pushed" / name / path).write_bytes(content)
    return folder


def test_what_is_loaded_by_name_is_what_was_written(folder):
    """Routers on the base of their name, the whole model, and both again without the Hub."""
    online, offline = (torch.load(folder / f"{name}.pt") for name in ("online", "offline"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        expected = model(online["ids"]).logits
        original = tiny_base()(online["ids"]).logits
    assert all(torch.equal(logits, expected) for found in (online, offline) for logits in found["logits"])
    assert not torch.equal(expected, original)


def test_only_what_is_needed_is_fetched(folder):
    fetched = (folder / "fetched").read_text()
    assert "model-00001-of" in fetched and "tokenizer.json" in fetched
    assert "pytorch_model.bin" not in fetched and "consolidated.safetensors" not in fetched


def test_whoever_pushes_is_asked_once(folder):
    """Two that may, and one that may not."""
    assert (folder / "fetched").read_text().count("whoami") == 3


def test_weights_are_those_of_the_cache(folder):
    links = sorted((folder / "model").glob("model-base-*.safetensors"))
    shards = sorted((folder / "base").glob("model-*.safetensors"))
    assert len(links) == len(shards) > 1
    assert [link.read_bytes() for link in links] == [shard.read_bytes() for shard in shards]
    blobs = {path.stat().st_ino for path in (folder / "cache").rglob("blobs/*")}
    assert all(link.stat().st_ino in blobs and not link.is_symlink() for link in links)


@pytest.mark.parametrize("name, relation", [(ROUTERS, "adapter"), (MODEL, "finetune")])
def test_cards(name, relation, folder):
    path = folder / "pushed" / name / "README.md"
    card = path.read_text()
    front = metadata_load(path)
    assert front["base_model"] == BASE and front["base_model_relation"] == relation
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert front["license"] == "other" and front["license_name"] == "free-for-all" and "mosa" in front["tags"]
    loaded = f'AutoModelForCausalLM.from_pretrained("{MODEL}")'
    if name == ROUTERS:  # which Auto classes take no `routers` for
        loaded = f'mosa_hf.MosaLlamaForCausalLM.from_pretrained("{BASE}", routers="{ROUTERS}")'
    assert loaded in card
    assert "mosa_hf's default" in card and "sha256" in card and "Not measured here. `mosa-evaluate someone/" in card
    assert re.search(r"last 8 tokens, and of those before them one in [\d.]+ \([\d.]+ to [\d.]+ by group\)", card)


def test_the_command_says_what_it_does(folder):
    printed, said = (folder / "printed").read_text(), (folder / "said").read_text()
    for text in ("Looking someone/base up", "Read someone/base (", "Calibration text: mosa_hf's default", "Decided: "):
        assert text in said
    assert "It computes in float32 on cpu" in said and "Uploaded to http" in printed
    lines = [line for line in printed.splitlines() if line.startswith(("A sequence's cache", "Next"))]
    assert lines[0].startswith("A sequence's cache, by the plan: 4 k tokens 1.6 MB -> 0.2 MB, 32 k tokens 12.6 MB")
    assert f"mosa-evaluate {BASE} --routers {folder / 'routers'}" in lines[1]


def test_a_gguf_file_of_the_hub(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "of_gguf")
    assert model.config.mosa_conversion["source"] == "someone/gguf" and model.dtype == torch.float32
    assert metadata_load(folder / "of_gguf" / "README.md")["base_model"] == "someone/gguf"


def test_errors_name_the_remedy(folder):
    stopped = [line for line in (folder / "printed").read_text().splitlines() if line.startswith("stopped:")]
    expected = (
        "someone/base has no `--revision` 'nothing'",
        "`--push-to-hub` needs to know who you are: `hf auth login`, or pass a `--token`",
        "`--push-to-hub` is 'no/such/name'",
        "`--routers` bring their own plan and thresholds: leave out `--plan`, `--groups`, `--sparsity`, `--window`",
        "someone/nothing does not exist: it is no folder here, and on the Hub",
        "someone/pickles has no safetensors weights on the Hub. Try the `--revision` of a pull request",
        "someone/gated is a gated model: ask for access on its page",
    )
    assert len(stopped) == len(expected)
    for line, text in zip(stopped, expected, strict=True):
        assert f"stopped: mosa-convert: {text}" in line
    assert not (folder / "none").exists() and (folder / "gated" / "config.json").exists()


def test_offline(folder):
    """What is in the cache converts, and what is not is refused by name."""
    assert (folder / "again" / "config.json").read_bytes() == (folder / "model" / "config.json").read_bytes()
    stopped = "stopped: mosa-convert: someone/other is no folder here, the Hub cannot be reached, and its cache"
    assert stopped in (folder / "offline").read_text()
