"""A text as windows of tokens: what routers are fitted on, and what healing learns from."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeGuard, cast

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..arguments import checked
from ..modeling.token_ids import check_no_padding, check_token_ids, padding_token

NUM_WINDOWS, WINDOW_LENGTH = 18, 1024  # that are read of a calibration text where nothing else is said

Chat = Sequence[Mapping[str, Any]]  # messages with `role` and `content`


@checked()
def token_windows(tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str | Chat], length: int) -> torch.Tensor:
    """
    All windows of `length` tokens of a text, one after the other: token ids `[N, T]`. What is left at the end is
    dropped.

    Args:
        tokenizer: the model's.
        text: one text; or several texts or chats, each a list of messages as the tokenizer's chat template takes
            them. They are read one after the other, texts with an end-of-sequence token after them if the tokenizer
            has one, so that a window may hold the end of one and the beginning of the next.
        length: tokens of a window.

    Raises:
        ValueError: for a text of less than one window, a window of no token, chats without a chat template, and what
            is neither text nor chat.
    """
    if length < 1:
        raise ValueError(f"`window_length` must be at least 1, got {length}.")
    input_ids = joined(documents_of(tokenizer, text))
    if len(input_ids) < length:
        raise ValueError(
            f"The text has {len(input_ids)} tokens, fewer than one window of {length}: give more text, or set a "
            "smaller `window_length`."
        )
    return cut(input_ids, length)


@checked()
def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str | Chat],
    num_windows: int = NUM_WINDOWS,
    window_length: int = WINDOW_LENGTH,
) -> torch.Tensor:
    """
    At most `num_windows` windows of `window_length` tokens, spread evenly over `text`: token ids `[N, T]`. `text` may
    be several texts, or chats; see `token_windows`.

    Raises:
        ValueError: if the text is shorter than one window, for numbers below 1, and see `token_windows`.
    """
    if num_windows < 1:
        raise ValueError(f"`num_windows` must be at least 1, got {num_windows}.")
    return spread(token_windows(tokenizer, text, window_length), num_windows)


def documents_of(tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str | Chat]) -> list[list[int]]:
    """Token ids of each text or chat; empty texts have none."""
    if isinstance(text, str):
        return [tokenizer(text, verbose=False)["input_ids"]]
    texts = [each for each in _texts_or_chats(tokenizer, text) if not isinstance(each, str) or each.strip()]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents: list[list[int]] = []
    for number, each in enumerate(texts, 1):
        if not isinstance(each, str):
            own = tokenizer.apply_chat_template(list(each), tokenize=True, return_dict=False)
        else:
            own = tokenizer(each, verbose=False)["input_ids"]
            if number < len(texts) and own[-1:] != end:
                own = own + end
        documents.append(cast(list[int], own))
    return documents


def _texts_or_chats(tokenizer: PreTrainedTokenizerBase, text: Any) -> list[Any]:
    """The items of a list of texts or chats; raises for what is none, or what the tokenizer cannot read."""
    if isinstance(text, Mapping) or not hasattr(text, "__iter__"):
        raise ValueError(f"`text` is a {type(text).__name__}; pass a text, or a list of texts or of chats.")
    texts: list[Any] = list(text)
    if texts and all(isinstance(each, Mapping) and "role" in each for each in texts):  # a single chat
        texts = [texts]
    if not all(isinstance(each, str) or is_chat(each) for each in texts):
        raise ValueError(
            "`text` must be a text, or a list of texts, or of chats: lists of messages with `role` and `content`, as "
            'in `[row["messages"] for row in rows]`.'
        )
    if tokenizer.chat_template is None and not all(isinstance(each, str) for each in texts):
        raise ValueError("`text` has chats, but the tokenizer has no `chat_template`: set it, or pass texts.")
    return texts


def is_chat(each: Any) -> bool:
    """Whether this is a list of messages."""
    is_list = isinstance(each, Sequence) and not isinstance(each, str) and len(each) > 0
    return is_list and all(isinstance(message, Mapping) and "role" in message for message in each)


def is_text(calibration: Any) -> TypeGuard[str | Sequence[str | Chat]]:
    """Whether a tokenizer has to read this: a text, texts or chats, not token ids."""
    if isinstance(calibration, str):
        return True
    is_list = isinstance(calibration, list | tuple) and len(calibration) > 0
    return is_list and (isinstance(calibration[0], str | Mapping) or is_chat(calibration[0]))


def calibration_ids(calibration: Any, config: PreTrainedConfig) -> torch.Tensor:
    """
    A calibration text as windows `[N, T]` of token ids that a model with `config` reads.

    Args:
        calibration: windows `[N, T]`; or a list of documents, each the token ids `[T]` of one, as a tensor or a list.
            Documents of one length are windows as they are. Others are read one after the other, with the config's
            end-of-sequence token between them if it has one, and cut into windows of at most `WINDOW_LENGTH` tokens,
            which may hold the end of one document and the beginning of the next.
        config: of the model, or of the language model in it.

    Raises:
        ValueError: for what has to be tokenized first, for padded batches, and for what is no token id of the model.
    """
    if is_text(calibration):
        raise ValueError(
            f"`input_ids`, the calibration text, is a {type(calibration).__name__} of what is to be tokenized; pass "
            "token ids [N, T], which `calibration_windows(tokenizer, text)` makes of a text, of texts and of chats."
        )
    if isinstance(calibration, Mapping):
        raise ValueError(
            f"`input_ids`, the calibration text, is a {type(calibration).__name__}, which may hold padding; pass "
            "token ids [N, T], or a list of the token ids of each document, without padding."
        )
    if isinstance(calibration, list | tuple):
        calibration = _windows_of(calibration, config)
    if not isinstance(calibration, torch.Tensor):
        raise ValueError(
            f"`input_ids`, the calibration text, is a {type(calibration).__name__}; pass token ids [N, T], which "
            "`calibration_windows(tokenizer, text)` makes, or a list of the token ids of each document."
        )
    check_token_ids(calibration, config.vocab_size, "input_ids")
    calibration = calibration.long()
    check_no_padding(calibration, padding_token(config), "input_ids")
    if calibration.ndim != 2 or len(calibration) < 1 or calibration.shape[1] < 2:
        raise ValueError(
            f"`input_ids` has shape {list(calibration.shape)}; pass [N, T], at least one window of T >= 2 tokens."
        )
    if bool((calibration == calibration[0, 0]).all()):
        raise ValueError(
            f"`input_ids`, the calibration text, is the token {int(calibration[0, 0])} over and over, of which "
            "nothing can be learned: pass text like that which the model will read."
        )
    return calibration


def _windows_of(documents: Sequence[Any], config: PreTrainedConfig) -> torch.Tensor:
    """`[N, T]`, see `calibration_ids`."""
    try:
        own = [torch.as_tensor(each) for each in documents]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`input_ids` has a document that is no list of token ids: {error}") from error
    if wrong := [each for each in own if each.ndim != 1]:
        raise ValueError(
            f"`input_ids` has a document of shape {list(wrong[0].shape)}; pass the token ids [T] of each document, or "
            "windows [N, T] as one tensor."
        )
    own = [each for each in own if len(each)]
    for each in own:
        check_token_ids(each, config.vocab_size, "input_ids")
    if own and all(len(each) == len(own[0]) for each in own):
        return torch.stack(own)
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    end = [] if end is None else [end]
    ids = [each.tolist() for each in own]
    text = joined([each if each[-1:] == end else each + end for each in ids[:-1]] + ids[-1:])
    return cut(text, min(WINDOW_LENGTH, config.max_position_embeddings // 2, max(len(text), 1)))


def joined(documents: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids `[T]` of all documents, one after the other."""
    return torch.tensor(list(chain.from_iterable(documents)), dtype=torch.long)


def cut(input_ids: torch.Tensor, length: int) -> torch.Tensor:
    """`input_ids` [T] as windows `[N, length]`, without what is left at the end."""
    return input_ids[: len(input_ids) // length * length].view(-1, length)


def spread(windows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of `windows` [N, T], spread evenly over them."""
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows)), dtype=torch.float32).round().long()]
