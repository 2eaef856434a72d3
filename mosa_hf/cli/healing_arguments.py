"""What is typed of a healing, besides Transformers' `TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Literal

from .options import TEXT_HELP, Dtype


@dataclass
class HealingArguments:
    model: str = field(metadata={"help": "directory of a converted model, or its name on the Hub"})
    original: str | None = field(
        default=None,
        kw_only=True,
        metadata={"help": "of a model that was healed before: directory or name of the model it was converted from"},
    )
    destination: str = field(metadata={"help": "directory to create; it appears only when it is whole"})
    text: list[str] = field(metadata={"help": TEXT_HELP})
    learn: Literal["lora", "full", "routers"] = field(
        default="lora",
        metadata={"help": "what learns: adapters (routers and adapters are written), all weights, or routers alone"},
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapters"})
    window_length: int = field(default=1024, metadata={"help": "tokens of an example"})
    cache_length: int = field(
        default=4096, metadata={"help": "log the share of keys and values that a cache keeps of this many tokens"}
    )
    top_k: int | None = field(default=None, metadata={"help": "compare the teacher's most likely tokens only"})
    text_characters: int = field(
        default=40_000_000, metadata={"help": "that are read of a data set or of a file of rows, at most"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a model on the Hub"})
    token: str | None = field(default=None, metadata={"help": "for private and gated models"})
    dtype: Dtype = field(default="auto", metadata={"help": "to load the model in (auto: its own)"})
