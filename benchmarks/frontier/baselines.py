"""
The baselines of `benchmarks.frontier`, by the code of kvpress. `python -m benchmarks.frontier.baselines JOB` runs in
an environment of its own, for kvpress wants an older Transformers than `mosa_hf`, of which one file alone is loaded
here.

JOB is a JSON file (see `main`): suites, of which a line of JSON on stdout is one method's scores in one; or readings,
of which a line is what one method answers about one. Prompts are read in full attention, once for all methods: each
takes from a layer's keys and values what it keeps. KVzip alone reads them by itself, twice.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from kvpress import (
    DMSPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KVzapPress,
    KVzipPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses.base_press import BasePress
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from .asking import Question, ask

SCORING = Path(__file__).parents[2] / "mosa_hf" / "evaluation" / "scoring.py"
_spec = importlib.util.spec_from_file_location("scoring", SCORING)
scoring = sys.modules["scoring"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scoring)

PRESSES = {
    "StreamingLLM": StreamingLLMPress,
    "SnapKV": SnapKVPress,
    "TOVA": TOVAPress,
    "ExpectedAttention": ExpectedAttentionPress,
    "KeyDiff": KeyDiffPress,
    "KVzip": KVzipPress,
}
FLOOR = 1e-9  # least score before the logarithm, as of our routers; KVzap's recipe has none


@dataclass
class TrainedKVzapPress(KVzapPress):
    """With a scorer that was trained here, instead of one from the hub."""

    kvzap_model: KVzapModel = field(default=None, repr=False)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        pass


@dataclass
class PressedMemory:
    """
    What a press has left of a context.

    layers: keys and values of each layer.
    step: tokens that are read at once; None: all. Of a masking press, one that leaves the window is masked at most so
        much later than if tokens came one by one.
    masked: of each layer the indices of entries that are there but no longer read; None where a press frees them.
    buffer: of scores, for presses that go on after the prompt.
    """

    model: PreTrainedModel
    press: BasePress
    num_tokens: int
    step: int | None = None
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    masked: list[list[torch.Tensor] | None] = field(default_factory=list)
    buffer: dict[int, torch.Tensor] = field(default_factory=dict)

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """See `scoring.Memory`."""
        cache = self.filled_cache()
        goes_on = isinstance(self.press, DMSPress)
        if goes_on:
            self.press.scores_buffer = dict(self.buffer)
        ids = ids.to(self.model.device)
        positions = self.num_tokens + torch.arange(ids.shape[1], device=ids.device)
        step = self.step or ids.shape[1]
        logits = []
        with self.masking() as attentions:
            with self.press(self.model) if goes_on else contextlib.nullcontext():
                for part, place in zip(ids.split(step, dim=1), positions.split(step), strict=True):
                    output = self.model(part, position_ids=place[None], past_key_values=cache, use_cache=True)
                    logits.append(output.logits[0])
            held = sum(
                _bytes_held(layer.keys, layer.values, attention.masked_key_indices)
                for layer, attention in zip(cache.layers, attentions, strict=True)
            )
        return torch.cat(logits), held

    def filled_cache(self) -> DynamicCache:
        """A cache of its own with what is left."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, layer)  # copies them
        return cache

    @contextlib.contextmanager
    def masking(self) -> Iterator[list[torch.nn.Module]]:
        """The attention modules, which leave out what is masked meanwhile."""
        attentions = [layer.self_attn for layer in self.model.model.layers]
        for attention, masked in zip(attentions, self.masked, strict=True):
            attention.masked_key_indices = masked
        try:
            yield attentions
        finally:
            for attention in attentions:
                attention.masked_key_indices = None

    def kv_bytes(self) -> float:
        """Of the context."""
        return sum(_bytes_held(*layer, masked) for layer, masked in zip(self.layers, self.masked, strict=True))


def _bytes_held(keys: torch.Tensor, values: torch.Tensor, masked: list[torch.Tensor] | None) -> float:
    """Of a layer, as if what is masked were gone."""
    gone = 0 if masked is None else len(masked[0])
    return (keys.nbytes + values.nbytes) * (1 - gone / keys[..., 0].numel())


class PressedReader:
    """A model that goes on after what a press has left of a context, see `asking.Reader`."""

    def __init__(self, memory: PressedMemory):
        self.memory, self.model, self.num_read = memory, memory.model, memory.num_tokens
        self.cache = memory.filled_cache()

    def read(self, ids: list[int], keep: int) -> torch.Tensor:
        positions = self.num_read + torch.arange(len(ids), device=self.model.device)
        with self.memory.masking():
            output = self.model(
                torch.tensor([ids], device=self.model.device),
                position_ids=positions[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        self.num_read += len(ids)
        return output.logits[0]

    def copy(self) -> "PressedReader":
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other


def read_pressed(
    model: PreTrainedModel, presses: list[tuple[BasePress, int | None]], context: torch.Tensor
) -> list[PressedMemory]:
    """
    What each of `presses`, with its step, leaves of `context` [1, T], which the model reads once, all of it in full
    attention, and once more for each KVzip.
    """
    memories = [PressedMemory(model, press, context.shape[1], step) for press, step in presses]
    pruning = [memory for memory in memories if not isinstance(memory.press, KVzipPress)]
    for memory in memories:
        if isinstance(memory.press, KVzipPress):
            _read_twice(memory, context)

    def press_each(module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        keys, values = layer.keys, layer.values
        for memory in pruning:
            module.masked_key_indices = None
            memory.press.forward_hook(module, args, kwargs, output)
            memory.layers.append((layer.keys, layer.values))
            memory.masked.append(module.masked_key_indices)
            layer.keys, layer.values = keys, values
        module.masked_key_indices = None

    handles = []
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # presses look for it there
        handles.append(layer.self_attn.register_forward_hook(press_each, with_kwargs=True))
    try:
        if pruning:
            model(context, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    for memory in memories:
        if isinstance(memory.press, DMSPress):
            memory.buffer = dict(memory.press.scores_buffer)
    return memories


def _read_twice(memory: PressedMemory, context: torch.Tensor) -> None:
    """KVzip has the model repeat the context, by hooks of its own, and masks what that needs least."""
    cache = DynamicCache()
    with memory.press(memory.model):
        memory.model(context, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer, decoder_layer in zip(cache.layers, memory.model.model.layers, strict=True):
        memory.layers.append((layer.keys, layer.values))
        memory.masked.append(decoder_layer.self_attn.masked_key_indices)
        decoder_layer.self_attn.masked_key_indices = None


def train_kvzap(model: PreTrainedModel, text: dict) -> tuple[KVzapModel, torch.Tensor]:
    """
    A linear KVzap scorer and what it says of its training text, sorted. As `kvzap/` in the repository of kvpress
    trains it (KVzip+ scores of a text that the chat template has repeated; ridge regression with an intercept and
    penalty 1), on our calibration text, all of its tokens, in place of 4500 texts of a data set.

    Args:
        text: `windows` of token ids, and those of the template `before` and `between` a text and its repetition.
    """
    config, num_layers = model.config, model.config.num_hidden_layers
    size, num_groups = config.hidden_size, config.num_key_value_heads
    before, between = text["before"], text["between"]
    length = len(text["windows"][0])
    first = slice(len(before), len(before) + length)
    again = slice(first.stop + len(between), first.stop + len(between) + length)
    # Sums over tokens of [x, 1, y] with itself: all that a regression needs.
    products = torch.zeros(num_layers, size + 1 + num_groups, size + 1 + num_groups, dtype=torch.float64)

    def collect(module, args, kwargs, output):
        hidden_states, attention = kwargs["hidden_states"][0], output[1][0]
        values = kwargs["past_key_values"].layers[module.layer_idx].values[0, :, first]
        strongest = (attention[:, again, first] / hidden_states[again].norm(dim=-1)[:, None]).amax(1)  # [H, T]
        num_heads, head_dim = attention.shape[0], values.shape[-1]
        projection = module.o_proj.weight.T.view(num_heads, head_dim, size)
        norms = (values.repeat_interleave(num_heads // num_groups, dim=0) @ projection).norm(dim=-1)  # [H, T]
        scores = (strongest * norms).view(num_groups, -1, length).amax(1).clamp_min(FLOOR).log()
        rows = torch.cat([hidden_states[first], torch.ones(length, 1), scores.T], dim=1).double()
        products[module.layer_idx].addmm_(rows.T, rows)

    predicted = []

    def predict(module, args, kwargs, output):
        predicted.append(scorer.layers[module.layer_idx](kwargs["hidden_states"][0]).flatten())

    @contextlib.contextmanager
    def hooked(function) -> Iterator[None]:
        handles = [layer.self_attn.register_forward_hook(function, with_kwargs=True) for layer in model.model.layers]
        yield
        for handle in handles:
            handle.remove()

    scorer = KVzapModel(KVzapConfig(input_dim=size, hidden_dim=None, output_dim=num_groups, n_modules=num_layers))
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with hooked(collect):
        for window in tqdm(text["windows"], desc="Training KVzap", unit="window"):
            ids = torch.tensor([before + window + between + window])
            model.model(ids, past_key_values=DynamicCache(), use_cache=True)
    model.set_attn_implementation(implementation)
    penalty = torch.cat([torch.ones(size), torch.zeros(1)]).double().diag()
    for linear, sums in zip(scorer.layers, products, strict=True):
        solved = torch.linalg.solve(sums[: size + 1, : size + 1] + penalty, sums[: size + 1, size + 1 :]).float()
        linear.weight.data, linear.bias.data = solved[:-1].T.contiguous(), solved[-1]
    with hooked(predict):
        for window in tqdm(text["windows"], desc="What KVzap says of its text", unit="window"):
            model.model(torch.tensor([window]), past_key_values=DynamicCache(), use_cache=True)
    return scorer.eval(), torch.cat(predicted).sort().values


def make_presses(model: PreTrainedModel, methods: list[dict], text: dict) -> list[BasePress]:
    """The press of each of `methods`, `{"name": ..., "parameters": ...}`; of KVzap with a threshold for its share."""
    presses, kvzap = [], None
    for method in methods:
        parameters = method["parameters"]
        if method["name"] in PRESSES:
            presses.append(PRESSES[method["name"]](compression_ratio=1 - parameters["kept"]))
            continue
        if kvzap is None:
            kvzap = train_kvzap(model, text)
        scorer, predicted = kvzap
        rank = round((1 - parameters["selected"]) * len(predicted))
        presses.append(
            DMSPress(
                TrainedKVzapPress(model_type="linear", kvzap_model=scorer),
                threshold=predicted[min(rank, len(predicted) - 1)].item(),
                sliding_window_size=parameters["window"],
                decoding=True,
            )
        )
    return presses


@torch.inference_mode()
def answers_to(job: dict) -> Iterator[dict]:
    """The answers to a job, see `main`, one after another."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    presses = make_presses(model, job["methods"], job["text"])
    total = sum(len(suite["samples"]) * len(suite["methods"]) for suite in job["suites"])
    with tqdm(total=total, desc="Baselines", unit="reading") as progress:
        for i, suite in enumerate(job["suites"]):
            scores: dict[int, list[scoring.Score]] = {method: [] for method in suite["methods"]}
            for sample in map(scoring.Sample.from_dict, suite["samples"]):
                own = [(presses[method], job["methods"][method]["parameters"].get("step")) for method in scores]
                memories = read_pressed(model, own, torch.tensor([sample.context]))
                for method, memory in zip(scores, memories, strict=True):
                    scores[method] += scoring.score(memory, sample)
                    progress.update()
            for method, own in scores.items():
                answer = {"suite": i, "method": method, "scores": list(map(dataclasses.asdict, own))}
                press = presses[method]
                yield answer | ({"threshold": press.threshold} if isinstance(press, DMSPress) else {})


@torch.inference_mode()
def answers_about(job: dict) -> Iterator[dict]:
    """The answers to a job of readings, see `main`, one after another."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    model.to(job["device"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    total = sum(len(reading["methods"]) for reading in job["readings"])
    with tqdm(total=total, desc="Rivals", unit="reading") as progress:
        for i, reading in enumerate(job["readings"]):
            names, kept = zip(*reading["methods"].items(), strict=True)
            presses = [
                (PRESSES[name](compression_ratio=1 - share), None) for name, share in zip(names, kept, strict=True)
            ]
            memories = read_pressed(model, presses, torch.tensor([reading["context"]], device=model.device))
            for name, memory in zip(names, memories, strict=True):
                if "questions" in reading:
                    reader = PressedReader(memory)
                    asked = map(Question.from_dict, reading["questions"])
                    answers = [dataclasses.asdict(ask(reader, tokenizer, each)) for each in asked]
                    found = {"answers": answers, "tokens": len(reading["context"]), "kv_bytes": memory.kv_bytes()}
                else:
                    (own,) = scoring.score(memory, scoring.Sample.from_dict(reading))
                    loss = -own.log_probability / own.tokens
                    found = {"loss": loss, "tokens": own.length, "kv_bytes": own.kv_bytes}
                yield {"reading": i, "method": name, **found}
                progress.update()


def main() -> None:
    """
    A job of suites: `model`, a folder; `methods`; `suites`, each with `samples` and the indices of its `methods`;
    `text`, see `train_kvzap`. An answer: `suite` and `method`, both indices; `scores`; of KVzap the `threshold`.

    A job of readings: `model`; its `dtype` and `device`; `readings`, each with a `context`, `questions` or the
    `continuations` of a sample, and `methods`, the share of the entries that each keeps. An answer: `reading`, an
    index, and `method`; `kv_bytes` and `tokens`; `answers`, or the `loss`.

    Answers to both have `versions`.
    """
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print too
        try:
            for answer in answers_about(job) if "readings" in job else answers_to(job):
                print(json.dumps({**answer, "versions": versions}), file=answers, flush=True)
        except KeyboardInterrupt:  # whoever asked has it too, and says so
            sys.exit(130)


if __name__ == "__main__":
    main()
