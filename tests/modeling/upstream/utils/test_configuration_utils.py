"""Values that differ from the defaults, for fields that every configuration has."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["Model"],
    "id2label": {0: "one", 1: "two", 2: "three"},
    "label2id": {"one": 0, "two": 1, "three": 2},
    "is_encoder_decoder": True,
    "problem_type": "regression",
}
