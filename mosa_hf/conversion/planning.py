"""
Plans by measured effect: what every key/value group becomes, so that a cache takes a given share of the original's
bytes and the model predicts as nearly as possible what the original does (docs/choosing.md).

Effects of single groups do not add up, so none is measured alone. The search starts at the best uniform plan. There,
one backward pass for each text tells what a larger or smaller window, and more or fewer selected tokens, would do in
each group while all others stay as they are. Groups that lose least by byte give to those that gain most; what comes
out is measured, kept if the model's divergence from the original fell, and the next exchange starts from it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from ..atomic_write import atomic_file
from ..modeling.configuration import is_composite
from ..modeling.family import family_of
from ..modeling.fingerprint import model_fingerprint
from ..modeling.group_plan import GroupPlan, SparseGroup
from ..modeling.thresholds import highest_share
from .allocation import candidate_plan, of_groups
from .calibration import MOST_OFFSET, RouterFit, fit_routers
from .configuration import ConversionConfig
from .effects import Effects
from .windows import Chat, calibration_ids, calibration_windows

# Two windows for each doubling.
WINDOWS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# One token in so many; beyond these, all but nothing.
SPARSITIES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
# A move is to a sparsity that differs by this factor at least.
LEAST_FACTOR = 1.2

Pair = tuple[int, int]


@dataclass(frozen=True)
class PlanningConfig:
    """
    What plan to search for.

    Args:
        share: of the original cache's bytes that the plan may take, layers with a sliding window aside.
        num_tokens: in texts of this many tokens, those that are read and those that follow.
        rounds: exchanges that are measured at most.
        step: share of the groups that change in the first exchange; half as many after one that was no gain.
        include_first: always select the first token (`mosa_include_first`).

    Raises:
        ValueError: naming the field.
    """

    share: float
    num_tokens: int = 4096
    rounds: int = 6
    step: float = 0.5
    include_first: bool = True

    def __post_init__(self):
        for name in ("share", "step"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {getattr(self, name)!r}.")
        for name, least in (("num_tokens", 2), ("rounds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)!r}.")


class Setting(NamedTuple):
    """What a search sets of a group."""

    window: int  # index of `WINDOWS`
    offset: float = 0.0  # by how much its threshold lies below the one of all groups


MOVES = ("larger window", "smaller window", "lower threshold", "higher threshold")


class Rates:
    """
    The plans of a model at one share of the bytes: rates follow from one threshold for all groups, and what groups
    have been moved by.

    Args:
        candidates: the plan that `fits` are of.
        fits: of the routers.
    """

    def __init__(self, planning: PlanningConfig, candidates: GroupPlan, fits: list[RouterFit | None]):
        self.planning, self.candidates = planning, candidates
        predicted = of_groups(candidates, [None if fit is None else fit.predicted for fit in fits])
        skip = int(planning.include_first)
        self.logits = {pair: logits[:, skip:].flatten().sort().values for pair, logits in predicted.items()}
        self.last = next((i for i, window in enumerate(WINDOWS) if window >= planning.num_tokens), len(WINDOWS) - 1)

    def plan(self, settings: dict[Pair, Setting], threshold: float) -> GroupPlan:
        """The plan with the rates that a threshold gives; at least one calibration token is selected."""
        kinds = {
            pair: SparseGroup(WINDOWS[setting.window], self._sparsity(pair, threshold - setting.offset))
            for pair, setting in settings.items()
        }
        return self.candidates.with_sparse(kinds)

    def _sparsity(self, pair: Pair, threshold: float) -> float:
        """The sparsity of a group with a threshold of its own."""
        logits = self.logits[pair]
        below = int(torch.searchsorted(logits, threshold))
        return round(len(logits) / max(len(logits) - below, 1), 2)

    def moved(self, pair: Pair, setting: Setting, move: str, threshold: float) -> Setting:
        """A setting after one of `MOVES`, under a threshold of all groups."""
        if move in ("larger window", "smaller window"):
            window = setting.window + (1 if move == "larger window" else -1)
            return setting._replace(window=min(max(window, 0), self.last))
        logits, now = self.logits[pair], self._sparsity(pair, threshold - setting.offset)
        if move == "lower threshold":
            sparsity = max((each for each in SPARSITIES if each * LEAST_FACTOR <= now), default=1.0)
        else:
            sparsity = min((each for each in SPARSITIES if each >= now * LEAST_FACTOR), default=float(len(logits)))
        own = float(highest_share(logits[:, None], [sparsity]))
        return setting._replace(offset=threshold - own)

    def share(self, plan: GroupPlan) -> float:
        """The share of the bytes of the original's cache, layers with a sliding window aside."""
        sparse = plan.sparse()
        kept = [sparse[pair].kept_share(self.planning.num_tokens) for pair in self.logits]
        return sum(kept) / len(kept)

    def threshold(self, settings: dict[Pair, Setting]) -> float | None:
        """The lowest with which the plan's bytes are within the share; None if the windows alone are more."""
        low = min(float(self.logits[pair][0]) + setting.offset for pair, setting in settings.items())
        high = max(float(self.logits[pair][-1]) + setting.offset for pair, setting in settings.items()) + 1
        if self.share(self.plan(settings, high)) > self.planning.share:
            return None
        for _ in range(50):
            middle = (low + high) / 2
            if self.share(self.plan(settings, middle)) > self.planning.share:
                low = middle
            else:
                high = middle
        return high


class Journal:
    """
    What was measured, by what was asked, text by text; in a file, if it has a path. A search that is resumed asks the
    same again, so it ends where it would have ended unbroken. The file is there from the beginning, and says whose
    the others of its directory are.

    Args:
        path: of the file.
        about: tells the search from others.
        num_texts: that each question is about.

    Raises:
        ValueError: for the file of another search.
    """

    def __init__(self, path: Path | None, about: str, num_texts: int):
        self.path, self.about, self.num_texts = path, about, num_texts
        self.answers: dict[str, list] = {}
        if path is not None and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["about"] != about:
                raise ValueError(
                    f"{path} is of a search with other settings, texts, or another model: remove it, or choose "
                    "another destination."
                )
            self.answers = content["answers"]
        self._write()

    def ask(self, question: list, measure: Callable[[int], Iterable]) -> Iterator:
        """The answer to `question` for each text; `measure` gives those from some text on, where they are unknown."""
        known = self.answers.setdefault(hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16], [])
        yield from list(known)
        if len(known) == self.num_texts:
            return
        for answer in measure(len(known)):
            known.append(answer)
            self._write()
            yield answer

    def _write(self) -> None:
        if self.path is not None:
            with atomic_file(self.path) as unfinished:
                content = {"about": self.about, "answers": self.answers}
                unfinished.write_text(json.dumps(content), encoding="utf-8")


def exchange(effects: torch.Tensor, costs: torch.Tensor, num_groups: int) -> dict[int, int]:
    """
    Which groups move, so that what they gain and lose balances.

    Args:
        effects: `[M, N]`, by how much each of M moves of each of N groups changes the divergence.
        costs: `[M, N]`, by how much it changes the bytes.
        num_groups: that move, at most: those with most to gain.

    Returns:
        group → its move.
    """

    def chosen(price: float) -> dict[int, int]:
        gains, moves = (effects + price * costs).min(0)
        best = gains.argsort()[:num_groups]
        return {int(group): int(moves[group]) for group in best if gains[group] < 0}

    def cost(price: float) -> float:
        return sum(float(costs[move, group]) for group, move in chosen(price).items())

    # The dearer bytes are, the more groups give some of theirs away.
    low, high = 0.0, 1.0
    while cost(high) > 0:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if cost(middle) > 0:
            low = middle
        else:
            high = middle
    return chosen(high)


class Found(NamedTuple):
    """What a search found."""

    plan: GroupPlan
    uniform: GroupPlan  # the best one with the same window in all groups, at which the search began
    divergence: float  # of the plan, in nats a token
    uniform_divergence: float
    share: float  # of the bytes that the plan takes

    def __str__(self) -> str:
        kind = next(kind for groups in self.uniform.layers for kind in groups if kind is not None)
        return (
            f"Divergence from the original: {self.divergence:.4g} nats a token. With a window of {kind.window} tokens "
            f"in all groups, the best one, and as many bytes: {self.uniform_divergence:.4g}. Share of the bytes: "
            f"{self.share:.4f}."
        )


class Search:
    """
    A search for a plan; `run` does it.

    Args:
        planning: what to search for.
        rates, effects: of the model and its texts.
        journal: of what was measured.
    """

    def __init__(self, planning: PlanningConfig, rates: Rates, effects: Effects, journal: Journal):
        self.planning, self.rates, self.effects, self.journal = planning, rates, effects, journal
        self.pairs = list(rates.logits)
        most = journal.num_texts * (4 + 2 * planning.rounds)  # a search may end sooner
        self.progress = logging.tqdm(total=most, desc="Planning", unit="text")

    def run(self) -> Found:
        with self.progress:
            return self._run()

    def _run(self) -> Found:
        start, divergence = self._uniform()
        settings, uniform_divergence = start, divergence
        number, effects = max(round(self.planning.step * len(self.pairs)), 1), None
        for _ in range(self.planning.rounds):
            self.progress.set_postfix(
                divergence=f"{divergence:.4g}", uniform=f"{uniform_divergence:.4g}", moves=number
            )
            if effects is None:
                effects, costs = self._moves(settings)
            chosen = exchange(effects, costs, number)
            if not chosen:
                break
            threshold, others = self._threshold(settings), dict(settings)
            for index, move in chosen.items():
                pair = self.pairs[index]
                others[pair] = self.rates.moved(pair, settings[pair], MOVES[move], threshold)
            found = self._divergence(others)
            if found is not None and found < divergence:
                settings, divergence, effects = others, found, None
            else:
                number //= 2
            if number == 0:
                break
        plan, uniform = self._plan(settings), self._plan(start)
        return Found(plan, uniform, divergence, uniform_divergence, self.rates.share(plan))

    def _uniform(self) -> tuple[dict[Pair, Setting], float]:
        """The best settings with one window for all groups: downhill on the scale of windows, from its middle."""

        def alike(window: int) -> dict[Pair, Setting]:
            return dict.fromkeys(self.pairs, Setting(window))

        def measured(window: int) -> float | None:
            return self._divergence(alike(window)) if 0 <= window <= self.rates.last else None

        possible = [i for i in range(self.rates.last + 1) if self.rates.threshold(alike(i)) is not None]
        if not possible:
            raise ValueError(
                f"`share={self.planning.share}` of {self.planning.num_tokens} tokens is less than a window of "
                f"{WINDOWS[0]} tokens and a selected token in each calibration window: raise it."
            )
        # Half of the bytes for the window, half for what is selected.
        half = self.planning.share * self.planning.num_tokens / 2
        best = min(possible, key=lambda i: abs(WINDOWS[i] - half))
        divergence = self._divergence(alike(best))
        assert divergence is not None
        for direction in (-1, 1):
            while (other := measured(best + direction)) is not None and other < divergence:
                best, divergence = best + direction, other
        return alike(best), divergence

    def _ask(self, question: list, measure: Callable[[int], Iterable]) -> list:
        """The journal's answers, one for each text."""
        answers = []
        for answer in self.journal.ask(question, measure):
            answers.append(answer)
            self.progress.update()
        return answers

    def _threshold(self, settings: dict[Pair, Setting]) -> float:
        """The threshold of settings that meet the share."""
        threshold = self.rates.threshold(settings)
        assert threshold is not None
        return threshold

    def _plan(self, settings: dict[Pair, Setting]) -> GroupPlan:
        return self.rates.plan(settings, self._threshold(settings))

    def _divergence(self, settings: dict[Pair, Setting]) -> float | None:
        """The divergence of the plan of some settings; None if they cannot meet the share."""
        if self.rates.threshold(settings) is None:
            return None
        plan = self._plan(settings)
        answers = self._ask(["divergence", plan.to_list()], lambda row: self.effects.of(plan, row))
        return sum(answers) / len(answers)

    def _moves(self, settings: dict[Pair, Setting]) -> tuple[torch.Tensor, torch.Tensor]:
        """What each of `MOVES` would do in each group, to the divergence and to the bytes, `[M, N]` each."""
        threshold = self._threshold(settings)
        plan = self.rates.plan(settings, threshold)
        others = [
            self.rates.plan(
                {pair: self.rates.moved(pair, each, move, threshold) for pair, each in settings.items()}, threshold
            )
            for move in MOVES
        ]
        answers = self._ask(
            ["moves", plan.to_list(), [other.to_list() for other in others]],
            lambda row: (effects.tolist() for effects in self.effects.of_moves(plan, others, row)),
        )
        effects = torch.tensor(answers).mean(0)  # [M, L, G]
        tokens = self.planning.num_tokens
        kept = [[each.sparse()[pair].kept_share(tokens) for pair in self.pairs] for each in (plan, *others)]
        costs = torch.tensor(
            [[(new - old) / len(self.pairs) for new, old in zip(own, kept[0], strict=True)] for own in kept[1:]]
        )
        layers, groups = zip(*self.pairs, strict=True)
        return effects[:, list(layers), list(groups)], costs


def search_plan(
    model: PreTrainedModel,
    planning: PlanningConfig,
    calibration: torch.Tensor,
    texts: torch.Tensor,
    *,
    fits: list[RouterFit | None] | None = None,
    directory: Path | None = None,
) -> Found:
    """
    Search for a plan.

    Args:
        model: of a family in `mosa_hf.modeling.families`, with a language-modelling head. It is left as it was.
        planning: what plan to search for.
        calibration: token ids `[N, T]` that routers are fitted on, as for `convert_model`.
        texts: token ids `[N, T]` that plans are measured on, few and long; see `measured_texts`.
        fits: what `fit_routers` gave for `candidate_plan` of all groups, where it is known.
        directory: for what is known so far, so that a search that was interrupted goes on.

    Raises:
        ValueError: for a share that no plan meets, the directory of another search, or a model of pictures and text.
    """
    if is_composite(type(model.config)):
        raise ValueError(
            f"Plans are searched for language models alone, and {type(model).__name__} has one within: search with a "
            "checkpoint of that, and convert the whole by the plan that is found."
        )
    config = family_of(model.config.model_type).config_class.from_base(model.config)
    candidates = candidate_plan(config, ConversionConfig(include_first=planning.include_first))
    calibration = calibration_ids(calibration, model.config)
    scale = {"most_offset": MOST_OFFSET}  # of importance, by which the routers that are kept were fitted
    about = [asdict(planning), model_fingerprint(model), config.to_dict(), scale, calibration.tolist(), texts.tolist()]
    digest = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]
    journal = Journal(directory and directory / "measured.json", digest, len(texts))
    if fits is None:
        fits = _fits(model, candidates, calibration, planning, directory and directory / "routers.safetensors")
    effects = Effects(model, fits, candidates, texts, include_first=planning.include_first)
    return Search(planning, Rates(planning, candidates, fits), effects, journal).run()


def measured_texts(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str | Chat], num_texts: int = 3, length: int = 4096
) -> torch.Tensor:
    """
    What plans are measured on: stretches of a text, token ids `[N, length]`. The last of several is half as long and
    read twice: most of what a model predicts it reads near by, and only there is all of what lies far back of use.

    Raises:
        ValueError: for a text shorter than one stretch.
    """
    texts = calibration_windows(tokenizer, text, num_texts, length)
    if len(texts) > 1:
        half = texts[-1, : (length + 1) // 2]
        texts[-1] = torch.cat((half, half))[:length]
    return texts


def _fits(
    model: PreTrainedModel,
    candidates: GroupPlan,
    calibration: torch.Tensor,
    planning: PlanningConfig,
    path: Path | None,
) -> list[RouterFit | None]:
    """The fits of the routers; those in a file, if there is one."""
    if path is None or not path.exists():
        fits = fit_routers(model, calibration, candidates, include_first=planning.include_first)
        if path is not None:
            with atomic_file(path) as unfinished:
                save_file(
                    {
                        f"{layer}.{name}": tensor.contiguous()
                        for layer, fit in enumerate(fits)
                        if fit is not None
                        for name, tensor in asdict(fit).items()
                    },
                    unfinished,
                )
        return fits
    tensors = load_file(path)
    return [
        RouterFit(**{field.name: tensors[f"{layer}.{field.name}"] for field in fields(RouterFit)})
        if any(groups)
        else None
        for layer, groups in enumerate(candidates.layers)
    ]
