"""What people have to calibrate on: texts, chats, documents of any length; and what is refused, by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BatchEncoding

from mosa_hf import ConversionConfig, calibrate_thresholds, convert_checkpoint, convert_model
from mosa_hf.conversion import calibration_windows
from mosa_hf.conversion.healing import TokenWindows
from mosa_hf.conversion.windows import calibration_ids, is_text
from testing.tiny import byte_tokenizer, random_tokens, tiny_base

from ..conftest import tiny_model

CONVERSION = ConversionConfig(window=4, sparsity=3)
TEXTS = ["A text of some words.", "", "Another one, which is longer than the first one was.", "And a third."]
CHATS = [
    [{"role": "user", "content": "What is a boat?"}, {"role": "assistant", "content": "What floats."}],
    [{"role": "user", "content": "Thank you."}],
]
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "!"  # a byte of its own, so that the texts have none
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def converted():
    return convert_model(tiny_base(), CONVERSION, random_tokens(2, 48))


def ids_of(tokenizer, text) -> list[int]:
    return tokenizer(text)["input_ids"]


def test_texts_are_read_one_after_the_other(tokenizer):
    """With an end of sequence between them; empty ones, as data sets have, are left out."""
    windows = calibration_windows(tokenizer, TEXTS, window_length=10)
    joined = ids_of(tokenizer, "!".join(text for text in TEXTS if text))
    assert windows.flatten().tolist() == joined[: len(joined) // 10 * 10]
    assert torch.equal(calibration_windows(tokenizer, TEXTS[:1], window_length=10), windows[:2])
    assert torch.equal(TokenWindows(tokenizer, TEXTS, 10).windows, windows)
    for empty in ([], ["", " "], ""):
        with pytest.raises(ValueError, match="has 0 tokens, fewer than one window of 10"):
            calibration_windows(tokenizer, empty, window_length=10)


def test_chats_are_read_through_the_template(tokenizer):
    said = "[user] What is a boat?\n[assistant] What floats.\n[user] Thank you.\n"
    windows = calibration_windows(tokenizer, CHATS, window_length=len(said))
    assert windows.tolist() == [ids_of(tokenizer, said)]
    assert calibration_windows(tokenizer, CHATS[1], window_length=18).tolist() == [ids_of(tokenizer, said[-18:])]
    with pytest.raises(ValueError, match="has chats, but the tokenizer has no `chat_template`"):
        calibration_windows(byte_tokenizer(), CHATS, window_length=8)
    mixed = calibration_windows(tokenizer, [TEXTS[0], CHATS[0]], window_length=40)
    expected = [*ids_of(tokenizer, TEXTS[0]), tokenizer.eos_token_id, *ids_of(tokenizer, said)]
    assert mixed.tolist() == [expected[:40]]
    for wrong in ([{"messages": CHATS[0]}], [TEXTS[0], [1, 2]], [[1, 2, 3]]):
        with pytest.raises(ValueError, match=r'or of chats: lists of messages .*row\["messages"\] for row in rows'):
            calibration_windows(tokenizer, wrong, window_length=8)
    for wrong in (3, {"text": TEXTS}):
        with pytest.raises(ValueError, match=f"`text` is a {type(wrong).__name__}; pass a text, or a list of texts"):
            calibration_windows(tokenizer, wrong, window_length=8)


def test_padding_without_an_embedding():
    """A token that is nothing takes nothing of the others: the routers are as they would be without its queries."""
    text = random_tokens(2, 48)
    text[:, 10] = 0
    model = convert_model(tiny_base(), CONVERSION, text)
    assert not tiny_base().model.embed_tokens.weight[0].any()
    assert all(router.weight.isfinite().all() and router.weight.any() for router in model.mosa_routers().values())


def test_documents_of_unequal_length():
    """As token ids: one after the other, in windows that the model can read twice."""
    config = tiny_base().config
    documents = [random_tokens(length, seed=length) for length in (300, 41, 700, 3)]
    windows = calibration_ids(documents, config)
    assert windows.shape == (4, 256)  # half of 512
    assert torch.equal(windows.flatten(), torch.cat(documents)[:1024])
    assert torch.equal(calibration_ids([each.tolist() for each in documents], config), windows)
    config.eos_token_id = [1, 2]
    ended = calibration_ids([*documents[:2], torch.tensor([5, 1]), documents[3]], config).flatten()
    one = torch.tensor([1])
    expected = torch.cat((documents[0], one, documents[1], one, torch.tensor([5, 1]), documents[3]))
    assert torch.equal(ended, expected[: len(ended)])
    alike = [random_tokens(8, seed=seed) for seed in range(3)]
    assert torch.equal(calibration_ids(alike, config), torch.stack(alike))


def test_a_model_is_converted_on_documents():
    documents = [random_tokens(length, seed=length) for length in (20, 31, 45)]
    model = convert_model(tiny_base(), CONVERSION, documents)
    joined = torch.cat(documents)[None]
    expected = convert_model(tiny_base(), CONVERSION, joined)
    assert model.config.mosa_conversion["calibration"] == {"windows": 1, "tokens": 96}
    for layer, router in model.mosa_routers().items():
        assert torch.equal(router.weight, expected.mosa_routers()[layer].weight)
        assert torch.equal(router.threshold, expected.mosa_routers()[layer].threshold)


def test_a_checkpoint_is_converted_on_texts_and_chats(tokenizer, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ids = [random_tokens(30).tolist(), random_tokens(20).tolist()]
    for i, (text, sizes) in enumerate(((TEXTS, {"window_length": 40}), (CHATS, {"window_length": 40}), (ids, {}))):
        plan = convert_checkpoint(tmp_path / "base", tmp_path / str(i), CONVERSION, text, routers_only=True, **sizes)
        assert len(plan.sparse_pairs()) == 6


WRONG = {
    "a text": ("A text.", r"is a str of what is to be tokenized; .*`calibration_windows\(tokenizer, text\)` makes"),
    "texts": (TEXTS, "is a list of what is to be tokenized; pass token ids"),
    "chats": (CHATS, "is a list of what is to be tokenized; pass token ids"),
    "padded": (BatchEncoding({"input_ids": random_tokens(2, 8)}), "is a BatchEncoding, which may hold padding"),
    "constant": (torch.full((2, 16), 7), "is the token 7 over and over"),
    "two tokens": (torch.tensor([[5, 9]]), "has 1 tokens to learn from, which all look alike"),
    "one token": (torch.tensor([[5]]), r"has shape \[1, 1\]; pass \[N, T\]"),
    "one document": (random_tokens(8), r"has shape \[8\]; pass \[N, T\]"),
    "no document": ([], r"has shape \[0, "),
    "empty documents": ([[], []], r"has shape \[0, "),
    "NaN": (torch.full((2, 8), torch.nan), "has dtype torch.float32; pass token ids"),
    "bool": (torch.ones(2, 8, dtype=torch.bool), "has dtype torch.bool"),
    "labels": (torch.tensor([[5, 9, -100]]), "from -100 to 9, but the vocabulary of the model has 256"),
    "other vocabulary": ([[5, 9, 256], [1, 2]], "from 5 to 256, but the vocabulary of the model has 256"),
    "windows in a list": ([random_tokens(2, 8)], r"has a document of shape \[2, 8\]"),
    "not numbers": ([[None, 3]], "has a document that is no list of token ids"),
    "a number": (3, "is a int; pass token ids"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_calibration_text(name):
    calibration, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        convert_model(tiny_base(), CONVERSION, calibration)


def test_models_that_are_converted_already(converted):
    ids = random_tokens(2, 16)
    with pytest.raises(ValueError, match=r"MosaLlamaForCausalLM is converted already: .*`mosa_hf.to_dense\(model\)`"):
        convert_model(converted, CONVERSION, ids)
    with pytest.raises(ValueError, match="MosaForCausalLM is the native model, whose heads select tokens already"):
        convert_model(tiny_model(), CONVERSION, ids)
    adapted = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"is a PEFT model \(.*: pass `model.merge_and_unload\(\)`"):
        convert_model(adapted, CONVERSION, ids)
    with pytest.raises(ValueError, match=r"that `torch.compile` wraps \(.*: pass what it wraps, `model._orig_mod`"):
        convert_model(torch.compile(tiny_base()), CONVERSION, ids)


def thresholds(model):
    return torch.cat([router.threshold for router in model.mosa_routers().values()])


def test_thresholds_of_documents(converted):
    """Each a row of its own; a batch is what it was."""
    documents = [random_tokens(length, seed=length) for length in (20, 31)]
    calibrate_thresholds(converted, [each[None] for each in documents])
    expected = thresholds(converted)
    for batches in (documents, [each.tolist() for each in documents], [{"input_ids": each} for each in documents]):
        calibrate_thresholds(converted, [torch.tensor([3, 4, 5, 6])])
        assert not torch.equal(thresholds(converted), expected)
        calibrate_thresholds(converted, batches)
        assert torch.equal(thresholds(converted), expected)


@pytest.mark.parametrize(
    "batches, words",
    [
        (["A text."], r"`mosa_hf.conversion.calibration_windows\(tokenizer, texts\)` makes them"),
        ("A text.", "makes them of texts and chats"),
        (CHATS, "makes them of texts and chats"),
        ([[[1, 2], [3]]], "`batches` must be several of token ids"),
        ({"input_ids": random_tokens(2, 8)}, "pass a list of them"),
        ([torch.rand(2, 8)], "`batches` has dtype torch.float32"),
        ([torch.tensor([[3, -100]])], "from -100 to 3, but the vocabulary"),
        ([[]], "has dtype torch.float32|holds no tokens"),
    ],
    ids=["texts", "text", "chats", "unequal rows", "a mapping", "floats", "labels", "empty"],
)
def test_what_is_no_batch(converted, batches, words):
    before = thresholds(converted)
    with pytest.raises(ValueError, match=words):
        calibrate_thresholds(converted, batches)
    assert torch.equal(thresholds(converted), before)


def test_what_a_tokenizer_has_to_read():
    assert all(is_text(each) for each in ("text", TEXTS, CHATS, CHATS[0]))
    assert not any(is_text(each) for each in (random_tokens(2, 4), [[1, 2]], [random_tokens(3)], [], None))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_text(side):
    """Where the padding token may not end a text: `SHAPE` has it 0, and no token that ends one."""
    base = tiny_base()
    text, padding = random_tokens(2, 40), torch.zeros(2, 6, dtype=torch.long)
    padded = torch.cat((padding, text) if side == "left" else (text, padding), dim=1)
    with pytest.raises(ValueError, match="`input_ids` has rows .* padding token"):
        convert_model(base, ConversionConfig(sparsity=4, window=5), padded)
    model = convert_model(base, ConversionConfig(sparsity=4, window=5), text.to(torch.uint8))
    with pytest.raises(ValueError, match="`batches` has rows .* padding token"):
        calibrate_thresholds(model, [padded])
    calibrate_thresholds(model, [{"input_ids": padded, "attention_mask": padded != 0}])
    alone = [router.threshold.clone() for router in model.mosa_routers().values()]
    calibrate_thresholds(model, [text])
    for threshold, router in zip(alone, model.mosa_routers().values(), strict=True):
        assert torch.allclose(threshold, router.threshold, atol=1e-4)
