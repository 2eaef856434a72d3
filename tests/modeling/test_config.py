"""Configurations of both forms: defaults, what they refuse and in which words, and the way to disk and back."""

import json
from dataclasses import fields as fields_of_class

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig

from mosa_hf import MosaConfig
from mosa_hf.modeling.configuration import RoutingConfig
from mosa_hf.modeling.family import family_of

from ..conftest import PLAN, SHAPE, sparse_form

NO_DENSE_HEADS = {"num_attention_heads": 0, "num_key_value_heads": 0}
NO_MOSA_HEADS = {"num_mosa_heads": 0, "num_mosa_key_value_heads": 0}
REFUSED = [
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"`num_attention_heads` \(4\).*\(3\)"),
    ({"num_attention_heads": 4, "num_key_value_heads": 0}, r"`num_attention_heads` \(4\).*\(0\)"),
    ({"num_attention_heads": 0, "num_key_value_heads": 2}, r"`num_attention_heads` \(0\).*\(2\)"),
    ({"num_attention_heads": -4, "num_key_value_heads": -2}, r"`num_attention_heads`.*not be negative"),
    ({"num_mosa_heads": 6, "num_mosa_key_value_heads": 4}, r"`num_mosa_heads` \(6\).*\(4\)"),
    ({"num_mosa_heads": 6, "num_mosa_key_value_heads": 0}, r"`num_mosa_heads` \(6\).*\(0\)"),
    ({"num_mosa_heads": 0, "num_mosa_key_value_heads": 4}, r"`num_mosa_heads` \(0\).*\(4\)"),
    ({"num_mosa_heads": -6, "num_mosa_key_value_heads": -6}, r"`num_mosa_heads`.*not be negative"),
    ({**NO_DENSE_HEADS, **NO_MOSA_HEADS}, r"`num_attention_heads` and `num_mosa_heads` are both 0"),
    ({"head_dim": 0}, r"`head_dim`.*got 0"),
    ({"head_dim": 7}, r"`head_dim`.*got 7"),
    ({"head_dim": -8}, r"`head_dim`.*got -8"),
    ({"sliding_window": 0}, r"`sliding_window` must be at least 1"),
    ({"mosa_sparsity": 0.99}, r"`mosa_sparsity`.*got 0\.99"),
    ({"mosa_sparsity": float("inf")}, r"`mosa_sparsity`.*inf"),
    ({"mosa_sparsity": float("nan")}, r"`mosa_sparsity`.*nan"),
    ({"mosa_min_tokens": 0}, r"`mosa_min_tokens` must be at least 1"),
    ({"mosa_threshold_momentum": 1.1}, r"`mosa_threshold_momentum`.*got 1.1"),
    ({"mosa_threshold_momentum": -0.1}, r"`mosa_threshold_momentum`.*got -0\.1"),
    ({"mosa_router_aux_loss_coef": -0.5}, r"`mosa_router_aux_loss_coef` must be finite and not negative"),
    ({"mosa_cache_budget": 0}, r"`mosa_cache_budget` must be at least 1.*got 0"),
    ({"mosa_cache_budget": 2**63}, r"`mosa_cache_budget` .* below 2\*\*63.*got 9223372036854775808"),
    ({"mosa_cache_dtype": "fp8"}, r"`mosa_cache_dtype` must be 'int8', or None for the model's dtype, got 'fp8'"),
]
WRONG_TYPES = {
    "num_mosa_heads": "4",
    "num_mosa_key_value_heads": 2.0,
    "mosa_sparsity": "16",
    "mosa_include_first": "yes",
    "mosa_min_tokens": None,
    "mosa_routing": "causal",
    "mosa_inference_routing": None,
    "mosa_threshold_momentum": "0.9",
    "mosa_router_bias": 1,
    "mosa_router_aux_loss_coef": None,
    "mosa_cache_budget": 2.5,
    "mosa_cache_dtype": 8,
    "mosa_conversion": "SmolLM2",
    "sliding_window": "4",
}


def test_defaults():
    config = MosaConfig()
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 128)
    assert (config.num_mosa_heads, config.num_mosa_key_value_heads) == (28, 28)
    assert config.mosa_sparsity == 16
    assert (config.mosa_routing, config.mosa_inference_routing) == ("expert_choice", "threshold")
    assert config.mosa_include_first and config.mosa_min_tokens == 2
    assert config.mosa_router_aux_loss_coef == 0 and not config.mosa_router_bias
    assert config.mosa_cache_budget is config.mosa_conversion is config.sliding_window is None


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"num_mosa_heads": 6}, {"num_mosa_key_value_heads": 6}),
        ({"num_mosa_heads": 6, "num_mosa_key_value_heads": 2}, {"num_mosa_key_value_heads": 2}),
        ({"num_mosa_heads": 0}, {"num_mosa_key_value_heads": 0}),
        ({"num_attention_heads": 0}, {"num_key_value_heads": 0}),
        ({"num_attention_heads": 8}, {"num_key_value_heads": 8}),
        ({"num_attention_heads": 4, "hidden_size": 64, "head_dim": None}, {"head_dim": 16}),
        ({"hidden_size": 50, "num_attention_heads": 4, "head_dim": 8}, {"hidden_size": 50}),  # heads need not fill it
        ({"mosa_sparsity": 1}, {"mosa_sparsity": 1}),
        ({"mosa_sparsity": 2.5}, {"mosa_sparsity": 2.5}),
        ({"mosa_threshold_momentum": 0}, {"mosa_threshold_momentum": 0}),
    ],
)
def test_accepted_and_derived_values(fields, expected):
    config = MosaConfig(**fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("fields, message", REFUSED, ids=lambda value: str(value)[:60])
def test_impossible_combinations_are_refused(fields, message):
    """For the whole model, and in any layer."""
    with pytest.raises(StrictDataclassError, match=message):
        MosaConfig(**fields)
    with pytest.raises(StrictDataclassError, match="layer 2: " + message):
        MosaConfig(num_hidden_layers=3, per_layer_config={2: fields})


@pytest.mark.parametrize("field, value", WRONG_TYPES.items())
def test_wrong_types_are_refused(field, value):
    for fields in ({field: value}, {"per_layer_config": {1: {field: value}}, "num_hidden_layers": 2}):
        with pytest.raises(StrictDataclassError, match=f"'{field}'"):
            MosaConfig(**fields)


@pytest.mark.parametrize("fields", [{"hidden_size": 64}, {"head_dim": 64}, {"intermediate_size": 8}], ids=str)
def test_fields_that_layers_share_cannot_differ(fields):
    (field,) = fields
    with pytest.raises(StrictDataclassError, match=rf"`per_layer_config` sets \['{field}'\], which all layers share"):
        MosaConfig(num_hidden_layers=3, per_layer_config={1: fields})


def test_head_dim_cannot_be_derived_without_dense_heads():
    with pytest.raises(ValueError, match="`head_dim` must be given when `num_attention_heads` is 0"):
        MosaConfig(num_attention_heads=0, head_dim=None)


def test_layers_may_have_either_kind_of_head_alone():
    config = MosaConfig(num_hidden_layers=3, num_mosa_heads=6, per_layer_config={0: NO_MOSA_HEADS, 2: NO_DENSE_HEADS})
    heads = [(layer.num_attention_heads, layer.num_mosa_heads) for layer in config.per_layer_config]
    assert heads == [(4, 0), (4, 6), (0, 6)]


def fields_of(config: MosaConfig) -> dict:
    """Everything but the directory that a config came from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def test_round_trip_through_disk(tmp_path):
    config = MosaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        head_dim=16,
        num_mosa_heads=6,
        num_mosa_key_value_heads=3,
        mosa_sparsity=7.5,
        mosa_include_first=False,
        mosa_min_tokens=1,
        mosa_routing="threshold",
        mosa_inference_routing="expert_choice",
        mosa_threshold_momentum=0.5,
        mosa_router_bias=True,
        mosa_router_aux_loss_coef=0.01,
        mosa_conversion={"source": "a/b", "groups": {"0": [1, 2]}, "sparsity": 7.5},
        per_layer_config={0: NO_MOSA_HEADS, 2: {**NO_DENSE_HEADS, "mosa_sparsity": 3}},
    )
    config.save_pretrained(tmp_path)
    for cls in (MosaConfig, AutoConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is MosaConfig
        assert fields_of(loaded) == fields_of(config)
        for layer, expected in zip(loaded.per_layer_config, config.per_layer_config, strict=True):
            assert fields_of(layer) == fields_of(expected)
        assert loaded.mosa_conversion == {"source": "a/b", "groups": {"0": [1, 2]}, "sparsity": 7.5}
        assert [layer.mosa_sparsity for layer in loaded.per_layer_config] == [7.5, 7.5, 3]


# --- sparse groups ---

MosaLlamaConfig = family_of("llama").config_class
ROUTING = [field.name for field in fields_of_class(RoutingConfig)]  # what both forms have
GROUP = {"window": 3, "sparsity": 4}
REFUSED_OF_SPARSE = [
    *((fields, message) for fields, message in REFUSED if next(iter(fields)) in ROUTING),
    ({"mosa_window": -1}, r"`mosa_window` must not be negative, got -1"),
    ({"mosa_gate_slope": -1}, r"`mosa_gate_slope` must be finite and not negative, got -1"),
    ({"mosa_gate_slope": float("inf")}, r"`mosa_gate_slope`.*inf"),
    ({"mosa_router_hidden_size": 0}, r"`mosa_router_hidden_size` must be at least 1.*got 0"),
    ({"mosa_router_hidden_size": -8}, r"`mosa_router_hidden_size` must be at least 1.*got -8"),
    ({"mosa_plan": [[GROUP] * 3] * 2}, r"plan has 2 layers, but the model has 3"),
    ({"mosa_plan": [[GROUP] * 3, [GROUP] * 2, [GROUP] * 3]}, r"plan names 2 groups in layer 1, but the model has 3"),
    ({"mosa_plan": [[None] * 3, [None] * 3, [None, {"window": 3}, None]]}, r"Layer 2, group 1 of the plan"),
    (
        {"mosa_plan": [[None] * 3, [GROUP | {"sparsity": 0.5}, None, None], [None] * 3]},
        r"Layer 1, group 0 .*`sparsity`",
    ),
]


@pytest.mark.parametrize("fields, message", REFUSED_OF_SPARSE, ids=lambda value: str(value)[:60])
def test_impossible_sparse_groups_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        sparse_form().config(**fields)


@pytest.mark.parametrize(
    "field, value",
    [
        *((field, value) for field, value in WRONG_TYPES.items() if field in ROUTING),
        ("mosa_window", 1.5),
        ("mosa_plan", "all"),
        ("mosa_gate_slope", "1"),
        ("mosa_router_hidden_size", 8.0),
    ],
)
def test_wrong_types_of_sparse_groups_are_refused(field, value):
    with pytest.raises(StrictDataclassError, match=f"'{field}'"):
        MosaLlamaConfig(**{field: value})


def test_fields_that_there_are_not_are_refused(tmp_path):
    """Upstream keeps any name as an attribute that nothing reads."""
    there = "`mosa_windw`: MosaLlamaConfig has no such field; it has mosa_sparsity, .*mosa_window"
    with pytest.raises(StrictDataclassError, match=there):
        MosaLlamaConfig(mosa_windw=3)
    with pytest.raises(StrictDataclassError, match=there):
        MosaLlamaConfig.from_base(LlamaConfig(), mosa_windw=3)
    with pytest.raises(StrictDataclassError, match="`mosa_plan`, `mosa_window`: MosaConfig has no such field"):
        MosaConfig(mosa_window=3, mosa_plan=None)
    sparse_form().config().save_pretrained(tmp_path)
    for cls in (MosaLlamaConfig, AutoConfig):
        with pytest.raises(ValueError, match=there):
            cls.from_pretrained(tmp_path, mosa_windw=3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mosa_windw": 3}))
    with pytest.raises(StrictDataclassError, match=there):
        AutoConfig.from_pretrained(tmp_path)


def test_shown_as_transformers_shows_configurations():
    layers = {"num_hidden_layers": 2, "per_layer_config": {1: {"mosa_sparsity": 3}}}
    for config in (MosaConfig(**layers), sparse_form().config()):
        text = str(config)
        assert text.startswith(type(config).__name__) and '"mosa_sparsity"' in text and '"hidden_size"' in text


def test_which_groups_are_sparse():
    config = sparse_form().config()
    groups = [config.groups_of_layer(layer) for layer in range(3)]
    assert [[each and vars(each) for each in layer] for layer in groups] == PLAN
    config = MosaLlamaConfig(**SHAPE, mosa_window=7, mosa_sparsity=3)
    assert {vars(each) == {"window": 7, "sparsity": 3} for i in range(3) for each in config.groups_of_layer(i)} == {
        True
    }
    local = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16, "num_hidden_layers": 2}
    config = sparse_form("gemma2", mosa_plan=None, **local).config()
    assert [any(config.groups_of_layer(layer)) for layer in range(2)] == [True, False]
    with pytest.raises(StrictDataclassError, match="layer 1 sparse, but its attention has a sliding window"):
        sparse_form("gemma2", mosa_plan=[[GROUP] * 3] * 2, **local).config()


def test_8_bit_entries_are_of_sparse_groups_alone():
    with pytest.raises(StrictDataclassError, match="`mosa_cache_dtype` is of sparse groups.*leave it out"):
        MosaConfig(mosa_cache_dtype="int8")
    with pytest.raises(StrictDataclassError, match="`mosa_cache_dtype` does not fit latent attention.*leave it out"):
        family_of("deepseek_v3").config_class(mosa_cache_dtype="int8")


def test_layers_that_read_an_encoder_are_refused():
    with pytest.raises(StrictDataclassError, match="`add_cross_attention` does not fit sparse groups"):
        family_of("gpt2").config_class(add_cross_attention=True)


def test_sparse_groups_to_disk_and_to_the_base_family_and_back(tmp_path):
    fields = {
        "mosa_cache_dtype": "int8",
        "mosa_cache_budget": 9,
        "mosa_gate_slope": 0,
        "mosa_router_bias": True,
        "mosa_conversion": {"a": [1]},
    }
    fields |= {"mosa_router_hidden_size": 8}
    config = sparse_form().config(**fields)
    config.save_pretrained(tmp_path)
    for cls in (MosaLlamaConfig, AutoConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is MosaLlamaConfig
        assert fields_of(loaded) == fields_of(config)
    base = config.to_base()
    assert type(base) is LlamaConfig
    assert not [name for name in base.to_dict() if "mosa" in name]
    mosa = {name: value for name, value in config.to_dict().items() if name.startswith("mosa")}
    assert fields_of(MosaLlamaConfig.from_base(base, **mosa)) == fields_of(sparse_form().config(**fields))
