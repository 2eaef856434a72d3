"""Token classification and question answering: heads of every family that has them, by Auto classes and pipelines."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, pipeline

from mosa_hf import ConversionConfig, convert_checkpoint
from mosa_hf.modeling.family import family_of
from testing.tiny import FAMILIES, byte_tokenizer, random_tokens, tiny_base

AUTO = {
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}
HEADS = [
    pytest.param(family, head, marks=() if family in ("llama", "gpt_neox") else pytest.mark.slow)
    for family in FAMILIES
    for head in AUTO
    if head in family_of(family).base_head_classes
]
IDS = random_tokens(2, 40)
WHOLE = {"attn_implementation": "eager"}  # the oldest versions leave Gemma 2's softcap out of their default
SENTENCES = ["Two men went out to the red buoy in a boat.", "At four they came back with a lamp, and with a dog."]


def convert(folder: Path, sparsity: float) -> Path:
    destination = folder.with_name(f"converted-{sparsity}")
    convert_checkpoint(folder, destination, ConversionConfig(sparsity=sparsity, window=4), random_tokens(3, 48))
    return destination


@torch.no_grad()
def outputs(model) -> list[torch.Tensor]:
    output = model(IDS)
    return [output.start_logits, output.end_logits] if "start_logits" in output else [output.logits]


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_heads_of_converted_folders(family, head, tmp_path):
    base, row, auto = tiny_base(family, head), family_of(family), AUTO[head]
    base.config.id2label = {0: "OUT", 1: "IN"}
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    original = auto.from_pretrained(tmp_path / "base", **WHOLE)
    for sparsity in (1, 3):
        folder = convert(tmp_path / "base", sparsity)
        model = auto.from_pretrained(folder)
        assert type(original) is type(base) and type(model) is row.head_classes[head]
        assert model.config.id2label == original.config.id2label == {0: "OUT", 1: "IN"}
        differences = [(a - b).abs().max() for a, b in zip(outputs(model), outputs(original), strict=True)]
        assert max(differences) < 1e-4 if sparsity == 1 else min(differences) > 1e-3  # something was selected
        model.save_pretrained(tmp_path / "again")
        assert all(map(torch.equal, outputs(auto.from_pretrained(tmp_path / "again")), outputs(model)))
        if head == "ForTokenClassification":  # there is no pipeline for the other any more
            ours, theirs = (
                pipeline("token-classification", str(each), model_kwargs=WHOLE)(SENTENCES)
                for each in (folder, tmp_path / "base")
            )
            assert [len(entities) for entities in ours] == [len(sentence) for sentence in SENTENCES]
            assert {entity["entity"] for entities in ours for entity in entities} == {"IN", "OUT"}
            if sparsity == 1:
                labels = [[[entity["entity"] for entity in entities] for entities in each] for each in (ours, theirs)]
                assert labels[0] == labels[1]
