"""What a model that has read a context answers, and how probable it finds the right answer."""

import copy
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf.compat import CACHE
from mosa_hf.modeling.devices import input_device

from .ruler import Question


@dataclass(frozen=True)
class Answer:
    """
    found: references that greedy decoding gives, `of` how many.
    log_probability: of the right answer's tokens, summed over `tokens`.
    """

    found: int
    of: int
    log_probability: float
    tokens: int


@torch.inference_mode()
def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, question: Question) -> Answer:
    """
    Greedy decoding after a context, and the probability of the right answer. RULER's score is the share of references
    that are in what is decoded (`string_match_all`).

    Args:
        cache: of the context. It stays as it is.
    """
    right = torch.tensor(question.answer)
    ids = question.prompt + question.answer
    logits = _read(model, copy.deepcopy(cache), ids, keep=len(right) + 1)[:-1].float().cpu()
    log_probability = -torch.nn.functional.cross_entropy(logits, right, reduction="sum").item()
    if bool((logits.argmax(-1) == right).all()):  # so that is what greedy decoding gives
        found = len(question.references)
    else:
        found = _num_found(model, tokenizer, copy.deepcopy(cache), question)
    return Answer(found, len(question.references), log_probability, len(right))


def _num_found(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, question: Question) -> int:
    """References in what is decoded."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = set(ends if isinstance(ends, list) else [ends])
    decoded: list[int] = []
    found, ids = 0, question.prompt
    while len(decoded) < question.max_new_tokens:
        token = int(_read(model, cache, ids, keep=1)[-1].argmax())
        if token in stops:
            break
        decoded.append(token)
        text = tokenizer.decode(decoded)
        found, ids = sum(reference in text for reference in question.references), [token]
        if found == len(question.references):
            break
    return found


def _read(model: PreTrainedModel, cache: Cache, ids: list[int], keep: int) -> torch.Tensor:
    """The last logits `[keep, V]` after tokens that the cache then holds too."""
    input_ids = torch.tensor([ids], device=input_device(model))
    return model(input_ids, use_cache=True, logits_to_keep=keep, **{CACHE: cache}).logits[0]
