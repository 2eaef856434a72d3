"""What is kept of a text: as real caches hold it, and as a page shows it, in a browser too."""

import base64
import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from mosa_hf import ConversionConfig, calibrate_thresholds, convert_model
from mosa_hf.cache import SparseLayer
from mosa_hf.cli import trace as command
from mosa_hf.compat import CACHE
from mosa_hf.evaluation import TracedGroup, TracedText, trace_text
from testing.tiny import QUIET, SENTENCES, byte_tokenizer, random_tokens, text_tokenizer, tiny_base

from ..conftest import native_form, sparse_form

TEXT = SENTENCES[:60]
BUDGETS = {0: {"mosa_cache_budget": 3}, 1: {"mosa_cache_budget": 7}}  # and none of the last layer
MODELS = {
    "windows": lambda: sparse_form(vocab_size=256).model(),
    "budget": lambda: sparse_form(vocab_size=256, mosa_cache_budget=3).model(),
    "native": lambda: native_form(vocab_size=256).model(),
    "native, budget": lambda: native_form(vocab_size=256, mosa_cache_budget=3).model(),
    "native, budget of a layer": lambda: native_form(vocab_size=256, per_layer_config=BUDGETS).model(),
}


@pytest.fixture(scope="module")
def converted():
    base = tiny_base(vocab_size=256)
    return convert_model(base, ConversionConfig(window=6, sparsity=4, groups=4), random_tokens(4, 64))


def held_by(model, input_ids: torch.Tensor) -> dict[tuple[int, int], int]:
    """(layer, group) → how many tokens the sparse groups of a real cache hold."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids, use_cache=True, **{CACHE: cache})
    return {
        (index, group): int(store.memory.length[0, place])
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, SparseLayer)
        for store, own in zip(layer.stores, layer.sparse_groups, strict=True)
        for place, group in enumerate(own)
    }


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_real_caches_hold(name):
    model, tokenizer = MODELS[name](), byte_tokenizer()
    input_ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    calibrate_thresholds(model, [input_ids])
    traced = trace_text(model, tokenizer, TEXT)
    assert "".join(traced.pieces) == TEXT and len(traced.pieces) == input_ids.shape[1]
    num_evicted = 0
    for at in (0, 3, 20, 47, 59):
        held = held_by(model, input_ids[:, : at + 1])
        own = {(each.layer, each.group): int(each.in_cache(at).sum()) for each in traced.groups}
        assert own == held and len(held) >= 5
        num_evicted += sum(
            int((each.selected[: at + 1] & ~each.in_cache(at)[: at + 1]).sum()) for each in traced.groups
        )
    assert (num_evicted > 0) == ("budget" in name)
    shares = [each.selected.float().mean().item() for each in traced.groups]
    assert 0.05 < min(shares) and max(shares) < 0.7  # neither nothing nor everything


def test_budgets_move_with_their_layers():
    model, tokenizer = MODELS["native, budget of a layer"](), byte_tokenizer()
    calibrate_thresholds(model, [torch.tensor([tokenizer(TEXT)["input_ids"]])])
    assert {each.layer for each in trace_text(model, tokenizer, TEXT).groups if each.until is not None} == {0, 1}
    del model.model.layers[0]
    model.config.num_hidden_layers = 2
    groups = trace_text(model, tokenizer, TEXT).groups
    assert {each.layer for each in groups} == {0, 1}
    assert {each.layer for each in groups if each.until is not None} == {0}
    assert max(int(each.in_cache(59).sum()) for each in groups if each.layer == 0) == 7


def test_dense_groups_are_told_apart(converted):
    traced = trace_text(converted, byte_tokenizer(), TEXT, max_tokens=20)
    assert len(traced.pieces) == 20 and len(traced.groups) == 4 and len(traced.dense) == 2
    pairs = [(each.layer, each.group) for each in traced.groups]
    assert sorted(pairs + traced.dense) == [(layer, group) for layer in range(3) for group in range(2)]
    assert not converted.training and not any(module._forward_hooks for module in converted.modules())


def test_pieces_are_the_text_whatever_tokens_are(converted):
    tokenizer = byte_tokenizer()  # a character of several bytes is several tokens
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert tokenizer.convert_tokens_to_ids("<s>") == 256
    text = "naïve 字, <b>&amp;</b>\n two"
    assert "".join(trace_text(converted, tokenizer, text).pieces) == text


def test_what_cannot_be_traced_is_refused(converted):
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoSA heads"):
        trace_text(tiny_base(vocab_size=256), tokenizer, TEXT)
    with pytest.raises(ValueError, match="`mosa_inference_routing='threshold'`"):
        trace_text(native_form(vocab_size=256, mosa_inference_routing="expert_choice").model(), tokenizer, TEXT)
    with pytest.raises(ValueError, match="`text` has no tokens"):
        trace_text(converted, tokenizer, "")
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1, got 0"):
        trace_text(converted, tokenizer, TEXT, 0)
    most = converted.config.max_position_embeddings
    long = "a" * (most + 1)
    with pytest.raises(ValueError, match=f"at most {most} tokens .*than the {most + 1} of the text: set a smaller"):
        trace_text(converted, tokenizer, long)
    with pytest.raises(ValueError, match=f"at most {most} tokens"):
        trace_text(converted, tokenizer, long, most + 1)
    with pytest.raises(ValueError, match="the vocabulary of the model has 97"):
        trace_text(native_form().model(), tokenizer, TEXT)


# Token: whether the groups hold it after the last one. A group with a window of 2, and one whose budget evicts.
TRACED = TracedText(
    'a "model" </script>',
    ["<b>", " one", "\n", " two", "</script>", " three"],
    [
        TracedGroup(0, 1, 2, torch.tensor([1, 0, 1, 0, 0, 0]).bool()),
        TracedGroup(2, 0, 0, torch.tensor([1, 1, 0, 1, 0, 1]).bool(), torch.tensor([9, 3, 9, 5, 9, 9])),
    ],
    [(0, 0), (2, 1)],
)


def test_tokens_that_a_text_lacks_are_refused():
    assert TRACED.in_cache(0).sum(1).tolist() == [1, 1] and TRACED.in_cache(5).sum(1).tolist() == [4, 2]
    for at in (-1, 6, 99):
        for traced in (TRACED, *TRACED.groups):
            with pytest.raises(ValueError, match=f"`at` must be one of the text's 6 tokens, counted from 0, got {at}"):
                traced.in_cache(at)


def test_a_page_has_all_of_it_and_needs_nothing_else():
    page = TRACED.page()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(data)
    assert data["name"] == TRACED.name and data["pieces"] == TRACED.pieces
    assert [tuple(each) for each in data["dense"]] == TRACED.dense
    for each, group in zip(data["groups"], TRACED.groups, strict=True):
        bits = base64.b64decode(each["selected"])
        assert [bool(bits[i >> 3] >> (i & 7) & 1) for i in range(6)] == group.selected.tolist()
        assert (each["layer"], each["group"], each["window"]) == (group.layer, group.group, group.window)
    assert [each["evicted"] for each in data["groups"]] == [[], [[1, 3], [3, 5]]]
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|fetch\(", page.replace(json.dumps(data), ""))


@QUIET
def test_the_command_writes_it(converted, tmp_path, capsys):
    folder, text, page = tmp_path / "model", tmp_path / "a.txt", tmp_path / "out" / "page.html"
    converted.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    text.write_text(SENTENCES, encoding="utf-8")
    command.main([str(folder), "--text", str(text), "--html", str(page), "--tokens", "50"])
    expected = trace_text(AutoModelForCausalLM.from_pretrained(folder).eval(), text_tokenizer(), SENTENCES, 50)
    assert page.read_text(encoding="utf-8") == expected.page()
    printed = capsys.readouterr().out
    assert "After 50 tokens, 4 sparse groups hold" in printed and str(page) in printed

    with pytest.raises(SystemExit, match="^mosa-trace: .*nothing.txt"):
        command.main([str(folder), "--text", str(tmp_path / "nothing.txt"), "--html", str(page)])
    with pytest.raises(SystemExit, match="^mosa-trace: `--tokens` must be at least 1"):
        command.main([str(folder), "--text", str(text), "--html", str(page), "--tokens", "0"])
    (tmp_path / "long.txt").write_text("a" * 200)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    with pytest.raises(SystemExit, match="^mosa-trace: .*at most 100 tokens .*fewer than the 101.*smaller `--tokens`"):
        command.main([str(folder), "--text", str(tmp_path / "long.txt"), "--html", str(page), "--tokens", "101"])
    command.main([str(folder), "--text", str(tmp_path / "long.txt"), "--html", str(page)])
    assert "After 100 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--version"])
    assert re.fullmatch(r"mosa-trace \S+\n", capsys.readouterr().out)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def in_browser(page: str, folder, fragment: str = "", script: str = "") -> dict:
    """What a browser shows of a page after what a script does there: its status, and of each token what it says."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={folder / 'profile'}"]
    result = subprocess.run(
        [CHROMIUM, *options, f"{path.as_uri()}#{fragment}"], capture_output=True, text=True, timeout=120, check=True
    )
    dom = result.stdout
    assert "Uncaught" not in result.stderr
    spans = re.findall(r"<span (?=[^>]*data-token)([^>]*)>(.*?)</span>", dom, re.DOTALL)
    return {
        "status": html.unescape(re.search(r'id="status"[^>]*>(.*?)</p>', dom, re.DOTALL)[1]),
        "text": "".join(html.unescape(piece) for _, piece in spans),
        "kept": [int(re.search(r'data-kept="(\d+)"', attributes)[1]) for attributes, _ in spans],
        "later": ["later" in attributes for attributes, _ in spans],
        "pressed": re.findall(r'<button data-group="([\d.]+)"[^>]*aria-pressed="true"', dom),
        "cells": re.findall(r'<button data-group="([\d.]+)"', dom),
        "title": html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]),
    }


@pytest.mark.real
@pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
def test_a_browser_shows_it(tmp_path):
    page = TRACED.page()
    shown = in_browser(page, tmp_path)
    assert shown["text"] == "".join(TRACED.pieces) and shown["title"].startswith(TRACED.name)
    assert shown["cells"] == ["0.0", "0.1", "2.0", "2.1"] and shown["pressed"] == []
    assert shown["kept"] == TRACED.in_cache(5).sum(0).tolist() and not any(shown["later"])
    assert "hold 6 of 12 (50.0 %)" in shown["status"]

    for at in range(6):  # every token, clicked
        shown = in_browser(page, tmp_path, script=f"document.querySelector('[data-token=\"{at}\"]').click()")
        assert shown["kept"] == TRACED.in_cache(at).sum(0).tolist()
        assert shown["later"] == [i > at for i in range(6)]
    for place, key in enumerate(("0.1", "2.0")):  # every group of the map, clicked
        click = f"document.querySelector('[data-group=\"{key}\"]').click();"
        shown = in_browser(page, tmp_path, "t=4", click)
        assert shown["kept"] == TRACED.groups[place].in_cache(4).int().tolist() and shown["pressed"] == [key]
        assert in_browser(page, tmp_path, f"t=4&g={key}")["kept"] == shown["kept"]  # which the address has too
        assert in_browser(page, tmp_path, "t=4", click * 2)["kept"] == TRACED.in_cache(4).sum(0).tolist()
    key = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));"
    assert in_browser(page, tmp_path, "t=4", key)["later"] == [False] * 4 + [True] * 2
