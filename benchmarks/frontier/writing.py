"""
Long writing: a model goes on with a list, at least 1,500 tokens of it, all of which it writes itself. Entries come
round and are numbered, so that each has to be looked up one round back: in what was read at first, then in what the
model has written, which a cache that forgets has lost. Its own, not one of RULER's tasks.
"""

from transformers import PreTrainedTokenizerBase

from mosa_hf.conversion.default_text import Source

from .ruler import Made, Reading, fitted, made_up_numbers, made_up_words

TASK = "long_writing"
LEAST_TOKENS = 1500
SEED = 1 << 40  # beyond those of RULER's tasks
READ = 1.5  # rounds of the list that are read, at least one of them whole


def reading(tokenizer: PreTrainedTokenizerBase, length: int, index: int) -> Reading:
    """
    A context and what follows it. As `ruler.reading`, with the whole continuation for an answer, of which each line is
    a reference: as many as make up `LEAST_TOKENS`.

    Raises:
        ValueError: for a length that has no room for it.
    """

    def make(source: Source, size: int, questions: int) -> Made:
        entries = list(zip(made_up_words(source, size), made_up_numbers(source, size, digits=4), strict=True))
        read = [_line(i, entries) for i in range(round(READ * size))]
        written, tokens = [], 0
        while tokens < LEAST_TOKENS:
            written.append(_line(len(read) + len(written), entries))
            tokens += len(tokenizer(written[-1], add_special_tokens=False)["input_ids"])
        text = "The same entries, again and again, with running numbers:\n" + "\n".join(read)
        return text, [("\n", "\n".join(written), tuple(written))]

    return fitted(tokenizer, make, TASK, length, SEED + index + 1_000_003 * length, questions=1)


def _line(i: int, entries: list[tuple[str, str]]) -> str:
    word, number = entries[i % len(entries)]
    return f"{i + 1}. {word} {number}"
