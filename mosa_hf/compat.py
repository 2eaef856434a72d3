"""What differs between the versions of Transformers that this package supports, 5.21 to 5.24."""

import inspect
from collections.abc import Callable
from functools import wraps

from transformers.masking_utils import create_causal_mask

# The name of a cache among the arguments of models and layers: "past_key_values" until Transformers 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def takes_cache(function: Callable) -> Callable:
    """Let a function that takes `past_key_values` take `cache` as well."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return function(*args, **kwargs)

    return wrapper
