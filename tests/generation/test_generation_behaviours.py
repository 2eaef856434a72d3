"""What `generate` promises of any causal model: outputs, inputs, cache arguments, processors, criteria, streamers."""

import copy
import time

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    cache_utils,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from mosa_hf import cache_bytes
from testing.tiny import text_tokenizer

from ..conftest import FORMS, PLAN, SHAPE, Form, native_form, sparse_form, tiny_llama
from ..contract import random_ids

NEW_TOKENS = 6
PROMPT_LENGTH = 11
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
}
HAS_FP8 = pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this version quantises by packages that are not here"
)
FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


def prompt(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return random_ids(rows, PROMPT_LENGTH, seed=seed)


def greedy(model, *args, **kwargs) -> torch.Tensor:
    return model.generate(*args, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)


def shapes(outputs) -> object:
    """The shapes of a tensor, or of the tensors in nested tuples; None stays."""
    if outputs is None:
        return None
    return tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else tuple(map(shapes, outputs))


@pytest.mark.parametrize(
    "strategy, use_cache",
    [
        ("greedy", True),
        ("greedy", False),
        ("sampling", True),
        ("beams", True),
        ("beams", False),
        ("beam_sampling", True),
    ],
)
@pytest.mark.parametrize("name", FORMS)
def test_outputs_are_shaped_as_llamas(name, strategy, use_cache):
    """Scores, logits, attentions of the native model's dense heads and hidden states, step by step; beams."""
    is_native, returned = name == "native", []
    for model in (native_form().model() if is_native else FORMS[name].model(), tiny_llama()):
        model.set_attn_implementation("eager")  # the one that gives attention weights
        returned.append(
            model.generate(
                prompt(),
                max_new_tokens=NEW_TOKENS,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                output_attentions=is_native,
                output_hidden_states=True,
                **STRATEGIES[strategy],
            )
        )
    outputs, expected = returned
    assert outputs.keys() == expected.keys()
    assert isinstance(outputs.past_key_values, DynamicCache) == use_cache
    for output in set(expected.keys()) - {"past_key_values", "cache"}:
        assert shapes(outputs[output]) == shapes(expected[output]), output
    assert len(outputs.scores) == NEW_TOKENS
    assert all(score.isfinite().all() for score in outputs.logits)


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
def test_scores_belong_to_the_sequences(form, strategy):
    model = form.model()
    outputs = model.generate(
        prompt(),
        max_new_tokens=NEW_TOKENS,
        length_penalty=0.0,  # scores of whole sequences, not divided by their length
        return_dict_in_generate=True,
        output_scores=True,
        **STRATEGIES[strategy],
    )
    transitions = model.compute_transition_scores(
        outputs.sequences, outputs.scores, outputs.get("beam_indices"), normalize_logits=strategy == "greedy"
    )
    logits = model(outputs.sequences, use_cache=False).logits[:, PROMPT_LENGTH - 1 : -1]
    of_tokens = logits.log_softmax(-1).gather(2, outputs.sequences[:, PROMPT_LENGTH:, None])[..., 0]
    assert torch.allclose(transitions, of_tokens, atol=1e-4)
    if strategy == "beams":
        assert torch.allclose(outputs.sequences_scores, of_tokens.sum(1), atol=1e-4)


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
def test_from_embeddings(form, strategy):
    """The tokens are those generated from the ids; alone, as there is no prompt to repeat."""
    model, options = form.model(), STRATEGIES[strategy] | {"max_new_tokens": NEW_TOKENS}
    from_ids = model.generate(prompt(), **options)
    embeddings = model.get_input_embeddings()(prompt())
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), from_ids[:, PROMPT_LENGTH:])
    both = model.generate(prompt(), inputs_embeds=embeddings, **options)
    assert torch.equal(both, from_ids)


def test_continuing_from_embeddings(form):
    model = form.model()
    embed, options = model.get_input_embeddings(), {"do_sample": False}
    whole = model.generate(inputs_embeds=embed(prompt()), max_new_tokens=9, **options)
    first = model.generate(inputs_embeds=embed(prompt()), max_new_tokens=4, return_dict_in_generate=True, **options)
    seen = torch.cat((embed(prompt()), embed(first.sequences)), dim=1)
    rest = model.generate(inputs_embeds=seen, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(torch.cat((first.sequences, rest), dim=1), whole)


def test_left_padding_changes_nothing(form):
    model = form.model()
    rows, padded = prompt(3), torch.zeros(3, PROMPT_LENGTH, dtype=torch.long)
    lengths = (PROMPT_LENGTH, 7, 1)
    mask = torch.zeros_like(padded)
    for row, length in enumerate(lengths):
        padded[row, -length:], mask[row, -length:] = rows[row, -length:], 1
    options = {"output_logits": True, "return_dict_in_generate": True}
    together = greedy(model, padded, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = greedy(model, rows[row : row + 1, -length:], **options)
        assert torch.equal(together.sequences[row, PROMPT_LENGTH:], alone.sequences[0, length:])
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            assert torch.allclose(ours[row], theirs[0], atol=1e-4)
    # Without a mask, `generate` derives it from the padding token.
    assert torch.equal(greedy(model, padded), together.sequences)


def test_without_a_prompt(form):
    model = form.model()
    generated = greedy(model)
    assert generated[0, 0] == SHAPE["bos_token_id"]
    assert torch.equal(generated, greedy(model, torch.tensor([[SHAPE["bos_token_id"]]])))


def test_the_prefill_computes_one_logit(form):
    """Logits of a whole prompt would take most of the memory of a long one."""
    model, lengths = form.model(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    greedy(model, prompt())
    assert lengths == [1] * NEW_TOKENS


def test_caches_that_generate_takes(form):
    """All give the same tokens and hold every token but the last, which was not fed back."""
    model = form.model()
    expected = greedy(model, prompt(), use_cache=False, return_dict_in_generate=True)
    assert expected.past_key_values is None
    for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
        options = {"cache_implementation": "dynamic"} if cache is None else {"past_key_values": cache}
        returned = greedy(model, prompt(), return_dict_in_generate=True, **options)
        assert cache is None or returned.past_key_values is cache
        assert torch.equal(returned.sequences, expected.sequences)
        assert returned.past_key_values.get_seq_length() == PROMPT_LENGTH + NEW_TOKENS - 1


@pytest.mark.parametrize("budget", [None, 3])
def test_a_reply_is_edited(form, budget):
    """As a chat does: generate, take some of it back, write something else, go on with the same cache."""
    model = form.model(mosa_cache_budget=budget)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cache, tokens = DynamicCache(config=model.config), prompt()
    for new_tokens, removed, edit in ((40, 30, 1), (12, 4, 0), (6, 1, 5)):
        tokens = model.generate(tokens, max_new_tokens=new_tokens, past_key_values=cache, **options).sequences
        cache.crop(-removed)
        tokens = torch.cat((tokens[:, : cache.get_seq_length()], random_ids(2, 1 + edit, seed=edit)), dim=1)
        continued = model.generate(tokens, max_new_tokens=4, past_key_values=copy.deepcopy(cache), **options)
        afresh = model.generate(tokens, max_new_tokens=4, **options)
        assert torch.equal(continued.sequences, afresh.sequences)
        for ours, theirs in zip(continued.logits, afresh.logits, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


def test_generating_leaves_nothing_in_the_model(form):
    model = form.model()
    before = greedy(model, prompt())
    greedy(model, prompt(3, seed=1), num_beams=2)
    with torch.inference_mode():
        assert torch.equal(greedy(model, prompt()), before)


class Forbid(LogitsProcessor):
    def __init__(self, tokens: list[int]):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor(self.tokens), -torch.inf)


class StopAt(StoppingCriteria):
    """Asks to stop row by row, once a row is `lengths[row]` long; generation ends when all rows have asked."""

    def __init__(self, *lengths: int):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


def test_custom_processor_and_criterion(form):
    model = form.model()
    tokens = greedy(model, prompt())
    unwanted = tokens[:, PROMPT_LENGTH].tolist()
    generated = greedy(model, prompt(), logits_processor=[Forbid(unwanted)])
    assert not torch.isin(generated[:, PROMPT_LENGTH:], torch.tensor(unwanted)).any()
    stopped = greedy(model, prompt(), stopping_criteria=[StopAt(PROMPT_LENGTH + 2, PROMPT_LENGTH + 4)])
    assert torch.equal(stopped, tokens[:, : PROMPT_LENGTH + 4])


PROCESSORS = {
    "penalties": {
        "repetition_penalty": 1.8,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[token] for token in range(2, 20)] + [[60, 61]],
        "suppress_tokens": list(range(20, 40)),
        "sequence_bias": [[[11], 5.0]],
    },
    "prefix_allowed": {"prefix_allowed_tokens_fn": lambda row, tokens: [len(tokens), 90]},
    "guidance": {"guidance_scale": 1.7},  # calls the model with a prompt and a cache of its own
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "min_p": 0.05, "top_k": 0, "typical_p": 0.8},
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_processors_give_the_same_with_and_without_a_cache(form, processor):
    model, options = form.model(), {"do_sample": False, "max_new_tokens": 12} | PROCESSORS[processor]
    generated = []
    for use_cache in (True, False):
        set_seed(0)
        generated.append(model.generate(prompt(), use_cache=use_cache, **options))
    assert torch.equal(*generated)
    set_seed(0)
    plain = model.generate(prompt(), max_new_tokens=12, do_sample=options["do_sample"])
    assert not torch.equal(generated[0], plain)  # the processor did something


def test_where_it_stops(form):
    model = form.model()
    whole = model.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert whole.shape[1] == PROMPT_LENGTH + 20
    assert torch.equal(model.generate(prompt(), max_length=15, do_sample=False), whole[:, :15])
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(prompt(), generation_config=config), whole[:, : PROMPT_LENGTH + 3])

    end = whole[0, PROMPT_LENGTH + 4].item()
    ended = model.generate(prompt(), max_new_tokens=20, do_sample=False, eos_token_id=end)
    for row, tokens in enumerate(ended[:, PROMPT_LENGTH:]):
        length = ([*whole[row, PROMPT_LENGTH:].tolist(), end].index(end)) + 1
        assert torch.equal(tokens[:length], whole[row, PROMPT_LENGTH : PROMPT_LENGTH + length])
        assert (tokens[length:] == SHAPE["pad_token_id"]).all()
    longer = model.generate(prompt(), max_new_tokens=20, min_new_tokens=12, do_sample=False, eos_token_id=end)
    assert end not in longer[:, PROMPT_LENGTH : PROMPT_LENGTH + 12]

    start = time.monotonic()
    in_time = model.generate(prompt(), max_new_tokens=10_000, max_time=0.2, do_sample=False)
    assert time.monotonic() - start < 10
    assert PROMPT_LENGTH < in_time.shape[1] < PROMPT_LENGTH + 10_000


def test_a_string_stops_it(form):
    """`generate` hands the tokenizer on to the model, as `transformers serve` always does."""
    model, tokenizer, short = form.model(vocab_size=256), text_tokenizer(), prompt()[:1]
    halves = [token for token in range(256) if len(tokenizer.decode([token]).encode()) > 1]  # no parts of characters
    options = {"max_new_tokens": 20, "do_sample": False, "tokenizer": tokenizer, "suppress_tokens": halves}
    whole = model.generate(short, **options)
    text = tokenizer.decode(whole[0, PROMPT_LENGTH : PROMPT_LENGTH + 5])
    assert torch.equal(model.generate(short, stop_strings=[text], **options), whole[:, : PROMPT_LENGTH + 5])


class Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.pieces.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("decoding", [{}, {"prompt_lookup_num_tokens": 2}], ids=["plain", "prompt_lookup"])
def test_streaming(form, decoding):
    """The prompt at once, then tokens as they come."""
    streamer = Collect()
    generated = greedy(form.model(), prompt(1), streamer=streamer, **decoding)
    assert streamer.ended
    assert torch.equal(streamer.pieces[0], prompt(1))
    assert len(streamer.pieces) > 1
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.pieces]), generated[0])


def test_several_sequences(form):
    model = form.model()
    sampled = model.generate(prompt(), max_new_tokens=12, do_sample=True, num_return_sequences=3)
    assert sampled.shape[0] == 6
    assert torch.equal(sampled[:, :PROMPT_LENGTH], prompt().repeat_interleave(3, 0))
    assert len(sampled.unique(dim=0)) == 6
    beams = greedy(
        model, prompt(), num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True
    )
    best_first = beams.sequences_scores.view(2, 4)
    assert torch.equal(best_first, best_first.sort(dim=1, descending=True).values)


@pytest.mark.parametrize("dtype, strategy", [(torch.float16, "greedy"), (torch.bfloat16, "beams")])
def test_half_precision(form, dtype, strategy):
    model, options = form.model().to(dtype), STRATEGIES[strategy] | {"max_new_tokens": NEW_TOKENS}
    outputs = model.generate(prompt(), output_logits=True, return_dict_in_generate=True, **options)
    assert all(logits.isfinite().all() for logits in outputs.logits)
    assert all(layer.keys.dtype == dtype for layer in outputs.past_key_values.layers)


@pytest.mark.parametrize("assistant", ["llama", "own", "prompt_lookup"])
def test_assistance_changes_no_token_and_no_score(form, assistant):
    """A draft of another kind, in both roles; what is drafted and rejected leaves no trace."""
    model = form.model()
    help_by = {
        "llama": {"assistant_model": tiny_llama(1)},
        "own": {"assistant_model": form.model(1)},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    }[assistant]
    for target in [model] if assistant != "own" else [model, tiny_llama()]:
        options = {"max_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        alone = target.generate(prompt(1), **options)
        helped = target.generate(prompt(1), **options, **help_by)
        assert torch.equal(helped.sequences, alone.sequences)
        for ours, theirs in zip(helped.logits, alone.logits, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
        assert helped.past_key_values.get_seq_length() == alone.past_key_values.get_seq_length()


@pytest.mark.parametrize("form", [native_form(), *FORMS.values()], ids=["uniform", *FORMS])
def test_drafting_with_the_first_layers(form):
    """Transformers lowers `num_hidden_layers` while it drafts: later layers must not run, nor need a cache."""
    model, calls = form.model(), []
    expected = greedy(model, prompt(1))
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: calls.append(module.self_attn.layer_idx))
    assert torch.equal(greedy(model, prompt(1), assistant_early_exit=2), expected)
    assert calls.count(2) < calls.count(1) == calls.count(0)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("help_by", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}], ids=str)
def test_a_cache_does_not_keep_all_tokens_after_assistance(help_by):
    """What was kept to roll drafts back goes, unless its owner had asked for it before."""
    model, ids = sparse_form("llama", mosa_plan=PLAN).model(), prompt(1)

    def after(is_recording: bool = False, **options) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        if is_recording:
            model.record_past(cache)
        tokens = greedy(model, ids, past_key_values=cache, **options)
        assert {layer.record_past for layer in cache.layers if hasattr(layer, "record_past")} == {is_recording}
        assert cache.get_seq_length() == tokens.shape[1] - 1
        greedy(model, tokens, past_key_values=cache)
        return cache

    helped, alone = after(**help_by), after()
    assert cache_bytes(helped)["sparse"] <= cache_bytes(alone)["sparse"]  # which can undo single tokens
    after(is_recording=True, **help_by).crop(-6)


def test_assisted_sampling_runs(form):
    generated = form.model().generate(prompt(1), max_new_tokens=15, do_sample=True, assistant_model=form.model(1))
    assert generated.shape == (1, PROMPT_LENGTH + 15)


def silence_dense_heads(model) -> None:
    """What dense heads of the forms say no longer counts."""
    for layer, plan in zip(model.model.layers, getattr(model.config, "mosa_plan", [None] * 3), strict=True):
        if not hasattr(layer.self_attn, "o_proj"):
            continue
        weight = layer.self_attn.o_proj.weight
        groups = weight.view(len(weight), 1 if plan is None else len(plan), -1)
        for group in range(groups.shape[1]):
            if plan is None or plan[group] is None:
                torch.nn.init.zeros_(groups[:, group])


@HAS_FP8
def test_quantised_cache_leaves_the_sparse_part_alone(form):
    """Only the dense heads' keys and values are rounded: a model whose dense heads say nothing loses nothing."""
    model, options = form.model(), {"return_dict_in_generate": True, "output_logits": True}
    outputs, exact = greedy(model, prompt(), **options, **FP8), greedy(model, prompt(), **options)
    assert all(logits.isfinite().all() for logits in outputs.logits)
    assert not torch.equal(outputs.logits[-1], exact.logits[-1])  # it does round
    if form is FORMS["native"]:
        # A byte a number instead of four, and a scale for the keys and one for the values of each of two layers.
        held = [cache_bytes(each.past_key_values)["dense"] for each in (outputs, exact)]
        assert held[0] == held[1] / 4 + 2 * 2 * 4
    silence_dense_heads(model)
    assert torch.equal(greedy(model, prompt(), **FP8), greedy(model, prompt()))


ALL_SPARSE = [[each or PLAN[1][0] for each in layer] for layer in PLAN]


@pytest.mark.parametrize(
    "form",
    [native_form(num_attention_heads=0, num_key_value_heads=0), sparse_form(mosa_plan=ALL_SPARSE)],
    ids=["native", "sparse"],
)
@HAS_FP8
def test_quantised_cache_of_layers_without_dense_heads(form: Form):
    """There is nothing to quantise, beams included."""
    model = form.model()
    assert torch.equal(greedy(model, prompt(), num_beams=2, **FP8), greedy(model, prompt(), num_beams=2))


def test_continuous_batching_is_refused(form):
    model = form.model()
    with pytest.raises(NotImplementedError, match="does not support continuous batching"):
        model.generate_batch(prompt().tolist())
    with pytest.raises(NotImplementedError, match="does not support continuous batching"):
        model.generate(prompt(), cache_implementation="paged")
