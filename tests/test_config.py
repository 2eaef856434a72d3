"""MosaConfig: defaults, what it refuses and in which words, and the way to disk and back."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from mosa_hf import MosaConfig

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
    ({"mosa_query_tokens": "all", "mosa_window": -1}, r"`mosa_window` must not be negative"),
    ({"mosa_query_tokens": "selected", "mosa_window": 4}, r"`mosa_window=4` needs `mosa_query_tokens='all'`"),
    ({"mosa_threshold_momentum": 1}, r"`mosa_threshold_momentum`.*got 1"),
    ({"mosa_threshold_momentum": -0.1}, r"`mosa_threshold_momentum`.*got -0\.1"),
    ({"mosa_router_aux_loss_coef": -0.5}, r"`mosa_router_aux_loss_coef` must be finite and not negative"),
    ({"mosa_cache_budget": 0}, r"`mosa_cache_budget` must be at least 1.*got 0"),
]
WRONG_TYPES = {
    "num_mosa_heads": "4",
    "num_mosa_key_value_heads": 2.0,
    "mosa_sparsity": "16",
    "mosa_query_tokens": "some",
    "mosa_window": 1.5,
    "mosa_include_first": "yes",
    "mosa_min_tokens": None,
    "mosa_routing": "causal",
    "mosa_inference_routing": None,
    "mosa_threshold_momentum": "0.9",
    "mosa_router_bias": 1,
    "mosa_router_aux_loss_coef": None,
    "mosa_cache_budget": 2.5,
    "mosa_conversion": "SmolLM2",
    "sliding_window": "4",
}


def test_defaults():
    config = MosaConfig()
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 128)
    assert (config.num_mosa_heads, config.num_mosa_key_value_heads) == (28, 28)
    assert (config.mosa_query_tokens, config.mosa_window, config.mosa_sparsity) == ("selected", 0, 16)
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
        ({"mosa_query_tokens": "all", "mosa_window": 64}, {"mosa_window": 64}),
    ],
)
def test_accepted_and_derived_values(fields, expected):
    config = MosaConfig(**fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("fields, message", REFUSED, ids=lambda value: str(value)[:60])
def test_impossible_combinations_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        MosaConfig(**fields)


@pytest.mark.parametrize("fields, message", REFUSED, ids=lambda value: str(value)[:60])
def test_impossible_combinations_are_refused_in_any_layer(fields, message):
    with pytest.raises(StrictDataclassError, match="layer 2: " + message):
        MosaConfig(num_hidden_layers=3, per_layer_config={2: fields})


@pytest.mark.parametrize("field, value", WRONG_TYPES.items())
@pytest.mark.parametrize("in_one_layer", [False, True], ids=["globally", "in_one_layer"])
def test_wrong_types_are_refused(field, value, in_one_layer):
    fields = {"per_layer_config": {1: {field: value}}, "num_hidden_layers": 2} if in_one_layer else {field: value}
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
        mosa_query_tokens="all",
        mosa_window=5,
        mosa_include_first=False,
        mosa_min_tokens=1,
        mosa_routing="threshold",
        mosa_inference_routing="expert_choice",
        mosa_threshold_momentum=0.5,
        mosa_router_bias=True,
        mosa_router_aux_loss_coef=0.01,
        mosa_conversion={"source": "a/b", "groups": {"0": [1, 2]}, "sparsity": 7.5},
        per_layer_config={0: NO_MOSA_HEADS, 2: {**NO_DENSE_HEADS, "mosa_sparsity": 3, "mosa_window": 9}},
    )
    config.save_pretrained(tmp_path)
    for cls in (MosaConfig, AutoConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is MosaConfig
        assert fields_of(loaded) == fields_of(config)
        for layer, expected in zip(loaded.per_layer_config, config.per_layer_config, strict=True):
            assert fields_of(layer) == fields_of(expected)
        assert loaded.mosa_conversion == {"source": "a/b", "groups": {"0": [1, 2]}, "sparsity": 7.5}
        assert [layer.mosa_window for layer in loaded.per_layer_config] == [5, 5, 9]
        assert [layer.mosa_sparsity for layer in loaded.per_layer_config] == [7.5, 7.5, 3]
