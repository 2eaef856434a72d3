"""
Models around decoders, end to end with a picture or a sound: one body for all types of `testing/tiny_multimodal.py`.

Gemma 3 reads pictures both ways, so that it is given text alone.
"""

import copy
import os
import pickle
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    DynamicCache,
)

import mosa_hf
from mosa_hf import (
    ConversionConfig,
    GroupPlan,
    cache_bytes,
    calibrate_thresholds,
    convert_checkpoint,
    convert_model,
    load_routers,
    save_cache,
    save_routers,
    to_dense,
    trace_routing,
)
from mosa_hf.compat import CACHE
from mosa_hf.conversion.calibration import fit_routers
from mosa_hf.conversion.causality import check_reads_forwards
from mosa_hf.modeling.configuration import sparse_config_of
from mosa_hf.modeling.decoder_inputs import continued, decoder_inputs
from mosa_hf.modeling.family import family_of
from mosa_hf.modeling.layers import decoder_of
from mosa_hf.modeling.model_card import auto_class_name
from testing.difference import difference
from testing.tiny import SENTENCES, byte_tokenizer, random_tokens, with_random_routers
from testing.tiny_multimodal import (
    END_TO_END,
    FIELDS,
    IMAGE,
    SOUNDS,
    SPECIAL,
    TYPES,
    multimodal_types,
    prompt,
    tiny_multimodal,
)

REPRESENTATIVES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "qwen2_audio")
EVERY_TYPE = pytest.mark.parametrize(
    "model_type", [pytest.param(x, marks=() if x in REPRESENTATIVES else pytest.mark.families) for x in TYPES]
)
SEEN = ("pixel_values", "input_features")  # of pictures, of sounds
PICTURES = ("llava", "qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.families))
WITH_PICTURES = pytest.mark.parametrize("model_type", PICTURES)
WITH_PICTURES_OR_SOUND = pytest.mark.parametrize("model_type", [*PICTURES, "qwen2_audio"])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": SPECIAL}  # a token of a picture needs one
CONVERSION = ConversionConfig(sparsity=3, window=4)


@lru_cache
def base_of(model_type: str):
    return tiny_multimodal(model_type)


@lru_cache
def sparse_of(model_type: str):
    """With routers of random weights, which share the weights of `base_of`."""
    model = with_random_routers(base_of(model_type), seed=1, mosa_sparsity=3, mosa_window=4)
    calibrate_thresholds(model, [random_tokens(4, 32, seed=2)])
    for router in model.mosa_routers().values():
        router.threshold -= 1e-3  # or rounding decides what becomes of a token at the threshold
    return model


def inputs_of(model_type: str, length: int = 24) -> dict[str, torch.Tensor]:
    return prompt(base_of(model_type), model_type, length, picture=model_type != "gemma3")


@torch.no_grad()
def logits_of(model, inputs, **options) -> torch.Tensor:
    return model(**inputs, **{"use_cache": False, **options}).logits


def left_padded(inputs, number: int = 5):
    """The same behind padding."""
    zeros = torch.zeros(1, number, dtype=torch.long)
    names = inputs.keys() & {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    return {**inputs, **{name: torch.cat([zeros, inputs[name]], dim=1) for name in names}}


@EVERY_TYPE
@torch.no_grad()
def test_selecting_everything_is_the_original(model_type):
    """Base model and head, with a picture or a sound, of which the output depends, and without."""
    family, inputs = family_of(model_type), inputs_of(model_type)
    for head in (None, "ForConditionalGeneration"):
        base = base_of(model_type) if head else tiny_multimodal(model_type, None)
        model = with_random_routers(base, mosa_sparsity=1, mosa_window=3)
        assert type(model) is (family.head_classes[head] if head else family.model_class)
        for given in (inputs, prompt(base, model_type, picture=False)):
            for options in ({"use_cache": False}, {}):
                assert difference(model(**given, **options)[0], base(**given, **options)[0]) < 5e-4, head
    if model_type != "gemma3":
        (seen,) = inputs.keys() & set(SEEN)
        others = {**inputs, seen: inputs[seen].flip(-1)}
        assert difference(logits_of(base_of(model_type), others), logits_of(base_of(model_type), inputs)) > 1e-2


@EVERY_TYPE
def test_generation(model_type):
    """Token by token as all at once, with every kind of cache, of a row and behind padding."""
    model, inputs = sparse_of(model_type), inputs_of(model_type)
    assert difference(logits_of(model, inputs), logits_of(base_of(model_type), inputs)) > 1e-2
    assert difference(logits_of(model, left_padded(inputs))[:, 5:], logits_of(model, inputs)) < 1e-4
    expected = model.generate(**inputs, **GREEDY, use_cache=False)
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    if model_type != "gemma3" or CACHE == "cache":  # before 5.24 Gemma 3 itself fails
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)
    padded = model.generate(**left_padded(inputs), **GREEDY)
    assert torch.equal(padded[:, 5:], expected)
    beams = {**GREEDY, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, **beams, use_cache=False))
    dense = base_of(model_type).generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert sum(cache_bytes(output.past_key_values).values()) < sum(cache_bytes(dense.past_key_values).values())


@EVERY_TYPE
def test_saved_and_loaded(model_type, tmp_path):
    model, inputs = sparse_of(model_type), inputs_of(model_type)
    expected = logits_of(model, inputs)
    copy.deepcopy(model).save_pretrained(tmp_path)
    of_pictures = set() if model_type in SOUNDS else {AutoModelForImageTextToText}
    for auto_class in {getattr(transformers, auto_class_name(type(model))), AutoModelForMultimodalLM} | of_pictures:
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
        assert type(decoder_of(loaded)) is type(decoder_of(model))
        assert sparse_config_of(loaded.config) is decoder_of(loaded).config
        assert difference(logits_of(loaded, inputs), expected) < 1e-5
    for name, states in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], states), name
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    if model_type not in SOUNDS or CACHE == "cache":  # older originals do not find theirs among a head's weights
        assert type(AutoModel.from_pretrained(tmp_path)) is family_of(model_type).model_class
    for name in ("eager", "sdpa") if base_of(model_type)._supports_sdpa else ("eager",):
        loaded.set_attn_implementation(name)
        assert difference(logits_of(loaded, inputs), expected) < 1e-4, name
    fresh = AutoModelForMultimodalLM.from_pretrained(tmp_path)  # upstream's hooks, once there are any, are none
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(fresh)), inputs), expected)
    changed = AutoModelForMultimodalLM.from_pretrained(tmp_path, mosa_gate_slope=2.0, mosa_cache_budget=5)
    assert (changed.config.text_config.mosa_gate_slope, changed.config.text_config.mosa_cache_budget) == (2.0, 5)


def test_misspelt_fields_are_refused(tmp_path):
    """As of a language model: by the decoder's configuration; by the model's class beside a base of another."""
    copy.deepcopy(sparse_of("llava")).save_pretrained(tmp_path / "model")
    save_routers(sparse_of("llava"), tmp_path / "routers")
    copy.deepcopy(base_of("llava")).save_pretrained(tmp_path / "base")
    load = mosa_hf.MosaLlavaForConditionalGeneration.from_pretrained
    with pytest.raises(StrictDataclassClassValidationError, match="`mosa_cache_buget`: .* has no such field"):
        load(tmp_path / "model", mosa_cache_buget=5)
    with pytest.raises(TypeError, match="mosa_cache_buget"):
        load(tmp_path / "base", mosa_cache_buget=5, routers=tmp_path / "routers")
    with pytest.raises(
        StrictDataclassClassValidationError, match="`mosa_window`: `mosa_\\*` fields are those of `text_config`"
    ):
        type(sparse_of("llava").config)(mosa_window=3)


@EVERY_TYPE
def test_leaving_the_routers_out_gives_the_base_back(model_type):
    base, inputs = base_of(model_type), inputs_of(model_type)
    back = to_dense(sparse_of(model_type))
    assert [type(each) for each in back.modules()] == [type(each) for each in base.modules()]
    states, expected = back.state_dict(), base.state_dict()
    assert states.keys() == expected.keys()
    assert all(states[name].data_ptr() == expected[name].data_ptr() for name in states)
    assert torch.equal(logits_of(back, inputs), logits_of(base, inputs))
    assert back.config.to_dict() == base.config.to_dict()


@EVERY_TYPE
def test_converted(model_type, tmp_path):
    """Calibrated on text; in memory, by a folder of routers, and on disk, where the weights are the base's files."""
    base, inputs, text = copy.deepcopy(base_of(model_type)), inputs_of(model_type), random_tokens(2, 40)
    model = convert_model(base, CONVERSION, text)
    expected = logits_of(model, inputs)
    with trace_routing(model) as selected:
        logits_of(model, inputs)
    rates = torch.cat([calls[0].float().mean((0, 1)) for calls in selected.values()])
    assert 0.1 < rates.mean() < 0.7
    save_routers(model, tmp_path / "routers")
    assert torch.equal(logits_of(load_routers(base, tmp_path / "routers"), inputs), expected)
    base.save_pretrained(tmp_path / "base")
    together = type(model).from_pretrained(tmp_path / "base", routers=tmp_path / "routers")
    assert torch.equal(logits_of(together, inputs), expected)
    plan = convert_checkpoint(tmp_path / "base", tmp_path / "converted", CONVERSION, text)
    assert plan == GroupPlan.of_config(model.config)
    (weights,) = (tmp_path / "converted").glob("model-base-*")
    assert os.path.samefile(weights, tmp_path / "base" / "model.safetensors")
    loaded, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(loaded, inputs), expected)


@EVERY_TYPE
def test_training_step(model_type, tmp_path):
    copy.deepcopy(sparse_of(model_type)).save_pretrained(tmp_path)
    model, inputs = AutoModelForMultimodalLM.from_pretrained(tmp_path), inputs_of(model_type)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if "mosa_router" in name}
    assert gradients and all(each is not None and each.isfinite().all() for each in gradients.values())


@WITH_PICTURES_OR_SOUND
@torch.no_grad()
def test_what_the_decoder_is_given(model_type):
    """Its inputs are those of the whole model, and may be read again, as by a prompt that has all twice."""
    base, inputs = base_of(model_type), inputs_of(model_type)
    given = decoder_inputs(base, inputs)
    expected = base.base_model(**inputs, use_cache=False).last_hidden_state
    decoder = decoder_of(base)
    assert difference(decoder(**given, use_cache=False).last_hidden_state, expected) < 1e-5
    dims = dict.fromkeys((*SEEN, "image_grid_thw", "feature_attention_mask"), 0)
    twice = {name: torch.cat([each, each], dim=dims.get(name, 1)) for name, each in inputs.items()}
    cache = DynamicCache(config=decoder.config)
    decoder(**given, past_key_values=cache, use_cache=True)
    again = decoder(**continued(given, 24), past_key_values=cache, use_cache=True).last_hidden_state
    assert difference(again, base.base_model(**twice, use_cache=False).last_hidden_state[:, 24:]) < 1e-4


@WITH_PICTURES_OR_SOUND
def test_calibrated_on_pictures_or_sounds(model_type):
    """Of several lengths; what routers learn depends on what is seen."""
    base = base_of(model_type)
    items = [inputs_of(model_type, length) for length in (24, 24, 30)]
    plan = GroupPlan.of_config(sparse_of(model_type).config)
    fits = fit_routers(base, items, plan)
    assert all(each.predicted.shape == each.importance.shape == (1, 24 + 23 + 29, 2) for each in fits)
    others = [each | {name: each[name].flip(-1) for name in SEEN if name in each} for each in items]
    assert difference(fits[-1].weight, fit_routers(base, others, plan)[-1].weight) > 1e-3
    model = convert_model(base, CONVERSION, items)
    assert model.config.text_config.mosa_conversion["calibration"] == {"windows": 3, "tokens": 30}
    with trace_routing(model) as selected:
        for each in items:
            logits_of(model, each)
    rates = [torch.cat([call[0].float() for call in calls]).mean() for calls in selected.values()]
    assert 0.2 < sum(rates) / len(rates) < 0.5


def test_what_cannot_be_calibrated_on():
    base, items = base_of("llava"), [inputs_of("llava")]
    with pytest.raises(ValueError, match="hides padding"):
        convert_model(base, CONVERSION, [left_padded(items[0])])
    with pytest.raises(ValueError, match="2 rows"):
        convert_model(base, CONVERSION, [{name: torch.cat([x, x]) for name, x in items[0].items()}])
    with pytest.raises(ValueError, match="reads text alone"):
        convert_model(base.model.language_model, CONVERSION, items)
    with pytest.raises(ValueError, match="calibrate on text"):
        convert_model(base_of("gemma3"), CONVERSION, [prompt(base_of("gemma3"), "gemma3")])


def test_pictures_that_are_read_both_ways():
    """Gemma 3's, in layers too that have sparse groups; text is read as the original reads it."""
    model = sparse_of("gemma3")
    picture = prompt(model, "gemma3")
    assert picture["token_type_ids"].any()
    for call in (lambda: logits_of(model, picture), lambda: model.generate(**picture, **GREEDY)):
        with pytest.raises(ValueError, match="read each other both ways.*to_dense"):
            call()


@pytest.mark.families
def test_a_compiled_model_does_not_look_at_masks():
    picture = prompt(base_of("gemma3"), "gemma3")
    with pytest.raises(ValueError, match="2-D masks alone"):
        torch.compile(sparse_of("gemma3"), backend="eager")(**picture, use_cache=False)


def test_prefix_models_are_refused():
    """By the config; and by what they compute, should a config not say so."""
    base = tiny_multimodal("paligemma")
    with pytest.raises(StrictDataclassClassValidationError, match="prefix-LMs"):
        mosa_hf.MosaPaliGemmaConfig.from_base(base.config)
    with pytest.raises(ValueError, match="a prefix-LM"):
        convert_model(base, CONVERSION, random_tokens(3, 40))
    base.config.text_config.use_bidirectional_attention = None
    with pytest.raises(ValueError, match="a prefix-LM"):
        check_reads_forwards(base)
    check_reads_forwards(base_of("llava"))


@WITH_PICTURES
def test_a_converted_decoder_alone_is_refused(model_type):
    """It would be saved with its routers, and loaded without, as the original's class."""
    base = copy.deepcopy(base_of(model_type))
    decoder = convert_model(base.model.language_model, CONVERSION, random_tokens(3, 40))
    assert difference(decoder(random_tokens(1, 8))[0], base.model.language_model(random_tokens(1, 8))[0]) > 0
    with pytest.raises(ValueError, match="without its routers. Convert the model whole"):
        base.model.language_model = decoder
    with pytest.raises(ValueError, match="without its routers. Convert the model whole"):
        base.model.set_decoder(decoder)
    config = type(base.config)(**{**FIELDS[model_type], "text_config": decoder.config})
    with pytest.raises(ValueError, match=f"build it of a `Mosa{type(config).__name__}`"):
        type(base)(config)
    nn.ModuleDict({"decoder": decoder})  # of someone's own


def test_configs():
    config_class = mosa_hf.MosaLlavaConfig
    with pytest.raises(StrictDataclassClassValidationError, match="`text_config` of a MosaLlavaConfig"):
        config_class(**FIELDS["llava"])
    config = config_class.from_base(base_of("llava").config, mosa_window=7)
    assert config.text_config.model_type == "mosa_llama" and config.text_config.mosa_window == 7
    assert config_class().text_config.model_type == "mosa_llama"
    with pytest.raises(ValueError, match="converted already"):
        convert_model(sparse_of("llava"), CONVERSION, random_tokens(3, 40))
    for name, reason in {
        "MosaFlorence2ForConditionalGeneration": "by a decoder alone",
        "MosaBlipForConditionalGeneration": "attention is code of its own",
    }.items():
        with pytest.raises(AttributeError, match=reason):
            getattr(mosa_hf, name)


@WITH_PICTURES
def test_caches_on_disk(model_type, tmp_path):
    """A cache does not know where tokens behind a picture stand, where the model alone does."""
    model, inputs = copy.deepcopy(sparse_of(model_type)), inputs_of(model_type)
    cache = DynamicCache(config=model.config)
    logits_of(model, inputs, past_key_values=cache, use_cache=True)
    if model_type == "llava":
        save_cache(cache, tmp_path / "cache", model)
    else:
        with pytest.raises(ValueError, match="rope_deltas"):
            save_cache(cache, tmp_path / "cache", model)


def test_from_text_with_the_folders_tokenizer(tmp_path):
    copy.deepcopy(base_of("llava")).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    convert_checkpoint(
        tmp_path / "base", tmp_path / "converted", CONVERSION, SENTENCES, num_windows=2, window_length=40
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "converted")("a")["input_ids"]
    assert (tmp_path / "converted" / "preprocessor_config.json").is_file()
    card = (tmp_path / "converted" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageTextToText.from_pretrained" in card and "6 of 6 key/value groups" in card


@pytest.mark.families
def test_loaded_where_nobody_imported_this_package(tmp_path):
    model, inputs = copy.deepcopy(sparse_of("llava")), inputs_of("llava")
    model.save_pretrained(tmp_path / "model")
    torch.save((inputs, logits_of(model, inputs)), tmp_path / "expected")
    code = (
        "import sys, torch; from transformers import AutoModelForImageTextToText as Auto\n"
        "assert 'mosa_hf' not in sys.modules\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        f"inputs, expected = torch.load({str(tmp_path / 'expected')!r})\n"
        "assert type(model).__name__ == 'MosaLlavaForConditionalGeneration'\n"
        "assert (model(**inputs, use_cache=False).logits - expected).abs().max() < 1e-5\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.families
def test_its_language_model_alone(tmp_path):
    """Where upstream's `AutoModelForCausalLM` takes the language model out of such a checkpoint."""
    model, ids = copy.deepcopy(sparse_of("qwen3_5")), random_tokens(1, 24)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "MosaQwen3_5ForCausalLM"
    assert difference(logits_of(loaded, {"input_ids": ids}), logits_of(model, {"input_ids": ids})) < 1e-5


@pytest.mark.families
def test_pictures_that_other_layers_read_are_refused():
    model = convert_model(tiny_multimodal("mllama"), CONVERSION, random_tokens(2, 40))
    with pytest.raises(ValueError, match="`cross_attention_states` would change attention scores"):
        logits_of(model, prompt(model, "mllama"))
    assert logits_of(model, prompt(model, "mllama", picture=False)).isfinite().all()


@pytest.mark.families
def test_every_type_is_accounted_for():
    found = multimodal_types()
    assert found.keys() >= set(FIELDS) and sum(each == END_TO_END for each in found.values()) >= 30
    assert "prefix-LM" in found["paligemma"] and found["florence2"].startswith("refused: Transformers has no model")


def test_pictures_are_where_they_are_said_to_be():
    assert (inputs_of("llava")["input_ids"] == IMAGE).sum() == 4
