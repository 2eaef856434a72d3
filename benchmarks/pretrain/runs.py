"""What `benchmarks.pretrain` trains: a configuration for each run, and presets, which are studies of many runs."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mosa_hf import MosaConfig

from . import flops

Kind = Literal["dense", "mosa", "stride", "window"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    One model, trained from scratch. Two runs that differ in `seed` alone differ in weights and in batches; two with
    the same seed read the same batches.

    kind: "dense": global heads alone. "mosa": and the paper's heads. "stride": the same heads reading every
        `sparsity`-th token. "window": heads with a window alone.
    routing: the rule while a "mosa" model trains.
    zero_outputs: projections into the residual stream start at zero, whatever their number.
    """

    kind: Kind
    seed: int = 0
    routing: Literal["expert_choice", "threshold"] = "expert_choice"
    dense_heads: int = 8
    mosa_heads: int = 0
    sparsity: float = 8.0
    window: int | None = None
    include_first: bool = True
    momentum: float = 0.95
    aux_loss: float = 0.0
    layers: int = 2
    hidden_size: int = 64
    intermediate_size: int = 176
    head_dim: int = 16
    length: int = 256
    batch_size: int = 4
    steps: int = 600
    learning_rate: float = 3e-3
    zero_outputs: bool = True
    vocab_size: int = 1024
    texts: tuple[str, ...] = ("python_docs", "shakespeare")
    unseen: str = "debian_handbook"
    characters: int = 3_000_000
    held_out_tokens: int = 16_384
    decoded_windows: int = 4

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Run":
        """
        Raises:
            TypeError, ValueError: for an unknown field, or fields that do not go together, by name.
        """
        if "texts" in fields:
            fields = {**fields, "texts": tuple(fields["texts"])}
        return cls(**fields)

    def __post_init__(self):
        if self.kind == "dense" and (self.mosa_heads or self.window):
            raise ValueError('"dense" has neither `mosa_heads` nor a `window`.')
        if self.kind == "window" and (self.mosa_heads or not self.window):
            raise ValueError('"window" has a `window` and no `mosa_heads`.')

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def config(self) -> MosaConfig:
        return MosaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.dense_heads,
            num_key_value_heads=self.dense_heads,
            head_dim=self.head_dim,
            sliding_window=self.window,
            num_mosa_heads=self.mosa_heads,
            mosa_sparsity=self.sparsity,
            mosa_routing=self.routing,
            mosa_include_first=self.include_first,
            mosa_threshold_momentum=self.momentum,
            mosa_router_aux_loss_coef=self.aux_loss,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=None,
        )

    def forward_flops(self, slots: float | None = None, squares: float | None = None) -> float:
        """FLOPs of one sequence; see `flops.forward`."""
        return flops.forward(self.config(), self.length, slots, squares, routers=self.kind == "mosa")

    def training_flops(self) -> float:
        """FLOPs of the whole run, a backward counted as two forwards."""
        return 3 * self.forward_flops() * self.batch_size * self.steps

    def matched(self, reference: "Run", name: str | None = None) -> "Run":
        """
        The run with as much of the field `name` as makes a forward cost what `reference`'s does, to the nearest whole
        number. By default it is the number of the paper's heads, or of windows where there are no others.
        """
        if name is None:
            name = "dense_heads" if self.kind in ("dense", "window") else "mosa_heads"
        one, two = (dataclasses.replace(self, **{name: heads}).forward_flops() for heads in (1, 2))
        heads = round((reference.forward_flops() - one) / (two - one)) + 1  # linear
        return dataclasses.replace(self, **{name: max(heads, 0)})


Studies = dict[str, list[Run]]
HEADLINE, MATCH, SPARSITY = "headline", "perplexity match", "sparsity"
FEWER = "a dense model with fewer heads"
RANDOM = "outputs that start at random"
BY_THRESHOLD = ", trained by threshold"
LAST_SEED = 2  # runs of later ones come last: they narrow intervals


def headline(dense: Run, mosa: Run, window: int) -> list[Run]:
    """Dense and its baselines of as many FLOPs, for the seed of `dense`."""
    mosa = dataclasses.replace(mosa, seed=dense.seed)
    baselines = [
        mosa,
        dataclasses.replace(mosa, routing="threshold"),
        dataclasses.replace(mosa, kind="stride"),
        dataclasses.replace(dense, kind="window", window=window),
    ]
    return [dense, *(baseline.matched(dense) for baseline in baselines)]


def cpu() -> Studies:
    """
    The committed results. Studies are in the order of their worth, so that what a run that is stopped lacks is the
    least of it.
    """
    dense, base = Run(kind="dense"), Run(kind="mosa", dense_heads=4)
    mosa = base.matched(dense)

    def variants(field: str, values: list[Any], of: Run = mosa) -> list[Run]:
        return [dataclasses.replace(of, **{field: value}) for value in values]

    def all_matched(runs: list[Run]) -> list[Run]:
        return [run.matched(dense) for run in runs]

    threshold = dataclasses.replace(mosa, routing="threshold")
    lengths = [
        dataclasses.replace(run, length=length, batch_size=1024 // length, sparsity=length / 32)
        for length in (128, 256, 512)
        for run in (dense, mosa)
    ]
    heads, sparsities = [4, 8, 16, 32, mosa.mosa_heads], [2.0, 4.0, 8.0, 16.0, 32.0]
    sparse = dataclasses.replace(base, routing="threshold")
    few = dataclasses.replace(dense, dense_heads=4)
    seeds = [dataclasses.replace(dense, seed=seed) for seed in range(3)]
    studies = {
        HEADLINE: [run for each in seeds for run in headline(each, base, 32)],
        FEWER: [
            run
            for each in seeds
            for own in (dataclasses.replace(few, seed=each.seed),)
            for run in (each, own.matched(each, "intermediate_size"), own)
        ],
        SPARSITY: [
            run
            for each, of_seed in zip(seeds, (sparsities, [8.0, 32.0], [8.0, 32.0]), strict=True)
            for own in (dataclasses.replace(base, seed=each.seed),)
            for run in (each, *all_matched(variants("sparsity", of_seed, own)))
        ],
        MATCH: [dense, *variants("mosa_heads", heads)],
        "dense heads": [dense, *all_matched(variants("dense_heads", [0, 1, 2, 4], base))],
        SPARSITY + BY_THRESHOLD: [dense, *all_matched(variants("sparsity", sparsities, sparse))],
        "threshold momentum": [dense, *variants("momentum", [0.9, 0.95, 0.99], threshold)],
        "length at 32 selected tokens": lengths,
        "first token always selected": [dense, *variants("include_first", [True, False])],
        "auxiliary loss": [dense, *variants("aux_loss", [0.0, 0.01])],
        "three times the training": [dataclasses.replace(run, steps=1800) for run in (dense, mosa, threshold)],
        MATCH + BY_THRESHOLD: [dense, *variants("mosa_heads", heads, threshold)],
    }
    rates = [dataclasses.replace(each, learning_rate=rate) for rate in (3e-3, 2e-3, 1e-3, 5e-3) for each in seeds]
    random = [*studies[HEADLINE], *rates, few, *studies[MATCH], *studies[SPARSITY][:6], *studies["dense heads"]]
    return studies | {RANDOM: [dataclasses.replace(run, zero_outputs=False) for run in random]}


def cpu_smoke() -> Studies:
    """Minutes that show that all of it runs, and nothing else."""
    dense = Run(
        kind="dense",
        layers=2,
        hidden_size=32,
        intermediate_size=64,
        dense_heads=4,
        length=64,
        steps=40,
        vocab_size=512,
        texts=("python_topics", "shakespeare"),
        unseen="encyclopaedia",
        characters=800_000,
        held_out_tokens=4096,
        decoded_windows=2,
    )
    base = dataclasses.replace(dense, kind="mosa", dense_heads=2, sparsity=4.0)
    mosa = base.matched(dense)
    return {
        HEADLINE: [run for seed in range(2) for run in headline(dataclasses.replace(dense, seed=seed), base, 16)],
        MATCH: [dense, *(dataclasses.replace(mosa, mosa_heads=heads) for heads in (2, mosa.mosa_heads))],
        SPARSITY: [dense, *(dataclasses.replace(base, sparsity=rho).matched(dense) for rho in (2.0, 4.0, 8.0))],
    }


def in_order(studies: Studies) -> list[Run]:
    """Each run once, in the order in which they are trained."""
    runs = dict.fromkeys(run for study in studies.values() for run in study)
    return sorted(runs, key=lambda run: run.seed > LAST_SEED)  # stable


PRESETS: dict[str, Callable[[], Studies]] = {"cpu": cpu, "cpu-smoke": cpu_smoke}
