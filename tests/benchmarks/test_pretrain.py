"""`benchmarks.pretrain`: what it counts, that interrupted work goes on as if nothing had been, and its page."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pretrain import __main__ as command
from benchmarks.pretrain import flops
from benchmarks.pretrain import model as pretrain_model
from benchmarks.pretrain import page as pretrain_page
from benchmarks.pretrain import rows as pretrain_rows
from benchmarks.pretrain.data import Corpus
from benchmarks.pretrain.model import StrideRouter, build, decoded, evaluate, reading_by, teacher_forced, train
from benchmarks.pretrain.runs import HEADLINE, MATCH, PRESETS, SPARSITY, Run, headline, in_order
from mosa_hf import MosaConfig, trace_routing
from testing import corpora, packages
from testing.markdown import unwrapped
from testing.tiny import QUIET

RESULTS = Path(command.__file__).parents[1] / "results"
DENSE = Run(
    kind="dense",
    dense_heads=3,
    layers=2,
    hidden_size=24,
    intermediate_size=40,
    head_dim=8,
    length=32,
    batch_size=2,
    steps=6,
    vocab_size=300,
    texts=("python_topics",),
    unseen="python_topics",
    characters=100_000,
    held_out_tokens=128,
    decoded_windows=2,
)
MOSA = dataclasses.replace(DENSE, kind="mosa", dense_heads=1, mosa_heads=5, sparsity=4.0)
STRIDE = dataclasses.replace(MOSA, kind="stride")
WINDOW = dataclasses.replace(DENSE, kind="window", window=8)


class RandomCorpus(Corpus):
    """Of random tokens, the same for everybody."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.training, self.held_out, self.unseen = (
            torch.randint(300, (length,), generator=generator, dtype=torch.int16) for length in (900, 200, 100)
        )
        self.digest = "random"


@pytest.fixture
def corpus(monkeypatch) -> Corpus:
    made = RandomCorpus()
    monkeypatch.setattr(pretrain_rows, "corpus_of", lambda run: made)
    return made


@pytest.mark.slow
def test_what_is_held_out_is_not_trained_on(tmp_path, monkeypatch):
    texts = {
        "python_topics": "".join(f"Line {i} of the first text is like no other.\n" for i in range(16_000)),
        "encyclopaedia": "Nothing of the kind. " * 5000,
    }
    monkeypatch.setattr(corpora, "text", lambda name: texts[name])
    monkeypatch.setenv("MOSA_HF_CACHE", str(tmp_path))
    corpus = Corpus(("python_topics",), "encyclopaedia", 400, 10**6)
    (path,) = tmp_path.iterdir()
    tokenizer = Tokenizer.from_file(str(path))
    training, held_out, unseen = (
        tokenizer.decode(ids.tolist()) for ids in (corpus.training, corpus.held_out, corpus.unseen)
    )
    assert len(training) + len(held_out) == len(texts["python_topics"]) and len(training) > 15 * len(held_out)
    lines = [set(re.findall(r"Line (\d+) of the first", text)) for text in (training, held_out)]
    assert lines[0] and lines[1] and len(lines[0] & lines[1]) <= 2 * len(held_out) / 20_000  # those at an edge
    assert texts["encyclopaedia"].startswith(unseen)

    batch = corpus.batch(1, 7, 3, 50)
    assert torch.equal(batch, corpus.batch(1, 7, 3, 50))
    assert not torch.equal(batch, corpus.batch(1, 8, 3, 50)) and not torch.equal(batch, corpus.batch(2, 7, 3, 50))
    assert tokenizer.decode(batch[0].tolist()) in training
    windows = corpus.windows(corpus.held_out, 1000, 100)
    assert windows.shape == (10, 100) and torch.equal(windows[-1], corpus.held_out[-100:].long())
    assert Corpus(("python_topics",), "encyclopaedia", 400, 10**6).digest == corpus.digest
    with pytest.raises(ValueError, match="`characters`"):
        Corpus(("python_topics",), "encyclopaedia", 400, 10**5)


def counted(run: Run, routing: str = "expert_choice") -> int:
    """What torch counts of a forward of one sequence, with attention as products of matrices, which it knows."""
    model = build(run).eval()
    input_ids = RandomCorpus().batch(0, 0, 1, run.length)
    with reading_by(model, routing), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(input_ids, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("run", [DENSE, MOSA, dataclasses.replace(MOSA, dense_heads=0, sparsity=16.0), STRIDE])
def test_flops_are_those_that_torch_counts(run):
    assert run.forward_flops() == counted(run)


def test_a_window_costs_its_keys_and_torch_computes_all_of_them():
    saved = 4 * 8 * 32 * (32 - 8) * 3 * 2  # channels, queries, keys, heads, layers
    assert WINDOW.forward_flops() == counted(WINDOW) - saved


def test_flops_of_thresholds_are_those_of_what_they_select():
    model = build(MOSA).eval()
    input_ids = RandomCorpus().batch(0, 0, 1, MOSA.length)
    with pretrain_model.Slots().counting(model) as slots, trace_routing(model) as selected, torch.no_grad():
        model(input_ids, use_cache=False)
    counts = torch.stack([calls[0].sum(1) for calls in selected.values()]).double()  # [layers, 1, groups]
    mean, square, most = slots.means()
    assert (mean, square) == pytest.approx((counts.mean().item(), counts.square().mean().item()))
    assert len(counts.unique()) > 1
    one_by_one = sum(flops.selected_head(MOSA.config(), count) for count in counts.flatten().tolist())
    rest = MOSA.forward_flops(0, 0)
    assert MOSA.forward_flops(mean, square) == pytest.approx(rest + one_by_one)
    # What is computed has as many slots in every group of a layer.
    padded = sum(MOSA.mosa_heads * flops.selected_head(MOSA.config(), layer.max().item()) for layer in counts)
    assert counted(MOSA, "threshold") == pytest.approx(rest + padded)
    assert most == pytest.approx(counts.amax((1, 2)).mean().item())


def test_layers_that_differ_are_not_counted():
    config = MosaConfig(**{**MOSA.config().to_dict(), "per_layer_config": {0: {"mosa_sparsity": 2}}})
    with pytest.raises(ValueError, match="alike"):
        flops.forward(config, 32)


@pytest.mark.parametrize("dense_heads", [0, 1, 2])
def test_baselines_cost_what_the_dense_model_does(dense_heads):
    dense = dataclasses.replace(DENSE, dense_heads=8)
    runs = headline(dense, dataclasses.replace(MOSA, dense_heads=dense_heads), 8)
    assert [run.kind for run in runs] == ["dense", "mosa", "mosa", "stride", "window"]
    assert {run.routing for run in runs if run.kind == "mosa"} == {"expert_choice", "threshold"}
    for run in runs[1:]:
        name = "dense_heads" if run.kind == "window" else "mosa_heads"
        more = dataclasses.replace(run, **{name: getattr(run, name) + 1})
        head = more.forward_flops() - run.forward_flops()
        assert abs(run.forward_flops() - dense.forward_flops()) <= head / 2


def test_every_preset_is_matched_and_named():
    for preset in PRESETS.values():
        studies = preset()
        dense = studies[HEADLINE][0]
        assert dense.kind == "dense" and studies[MATCH][0] == dense
        for run in studies[HEADLINE] + studies[SPARSITY]:
            assert run.forward_flops() == pytest.approx(dense.forward_flops(), rel=0.04)
        runs = in_order(studies)
        assert len(runs) == len(set(runs)) == len({run for study in studies.values() for run in study})
        assert runs[: len(set(studies[HEADLINE][:10]))] == studies[HEADLINE][:10]
        for study in studies.values():
            assert pretrain_page.dense_of(study, study[-1]) is not None
            assert all(Run.from_dict(run.to_dict()) == run for run in study)


def test_a_stride_selects_by_position():
    model = build(STRIDE).eval()
    input_ids = RandomCorpus().batch(0, 0, 2, 32)
    with trace_routing(model) as selected, torch.no_grad():
        model(input_ids, use_cache=False)
    (calls, *_) = selected.values()
    assert torch.equal(calls[0], (torch.arange(32) % 4 == 0)[None, :, None].expand(2, 32, 5))
    router = model.model.layers[0].self_attn.mosa.router
    assert isinstance(router, StrideRouter) and not list(router.parameters())


@pytest.mark.parametrize("run", [DENSE, MOSA, STRIDE, WINDOW], ids=lambda run: run.kind)
def test_decoding_gives_the_loss_of_reading_at_once(run):
    model, windows = build(run).eval(), RandomCorpus().batch(0, 0, 2, 32)
    loss, held = decoded(model, windows)
    labels = windows.clone()
    assert loss == pytest.approx(teacher_forced(model, windows), abs=1e-5)
    assert loss == pytest.approx(model(windows, labels=labels, use_cache=False).loss.item(), abs=1e-5)
    entry = 2 * 4 * 8 * run.layers  # keys and values of one token in one head of each layer
    cached = 31 if run.window is None else run.window  # the last of 32 tokens is not read
    assert held["dense"] == entry * run.dense_heads * cached


def test_a_decoder_that_disagrees_fails(corpus, monkeypatch):
    monkeypatch.setattr(pretrain_model, "decoded", lambda model, windows: (1.0, {}))
    with pytest.raises(AssertionError, match="Decoding gives"):
        evaluate(DENSE, build(DENSE), corpus)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["expert_choice", "threshold"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(routing, corpus, tmp_path, monkeypatch):
    run = dataclasses.replace(MOSA, routing=routing)
    whole, result = train(run, corpus, tmp_path / "whole.pt")
    monkeypatch.setattr(pretrain_model, "CHECKPOINT_SECONDS", -1)  # after every step
    batches = []

    class Interrupted(RandomCorpus):
        def batch(self, seed, step, *shape):
            batches.append(step)
            if len(batches) == 4:
                raise KeyboardInterrupt
            return super().batch(seed, step, *shape)

    with pytest.raises(KeyboardInterrupt):
        train(run, Interrupted(), tmp_path / "part.pt")
    resumed, again = train(run, Interrupted(), tmp_path / "part.pt")
    assert batches == [0, 1, 2, 3, 3, 4, 5]
    times = {"step_cpu_ms"}
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in result.items() if k not in times}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@QUIET
@pytest.mark.slow
def test_from_configurations_to_a_page(corpus, tmp_path, capsys, monkeypatch):
    runs = [dataclasses.replace(run, steps=3) for run in headline(DENSE, MOSA, 8)]
    config = tmp_path / "runs.json"
    config.write_text(json.dumps([run.to_dict() for run in runs]))
    trained = []
    monkeypatch.setattr(pretrain_rows, "train", lambda run, *others: trained.append(run) or train(run, *others))
    monkeypatch.setattr(packages, "cache_directory", lambda: tmp_path / "cache")
    arguments = ["--config", str(config), "--output", str(tmp_path / "results")]
    command.main(arguments)
    assert trained == runs
    rows = [json.loads(line) for line in (tmp_path / "results/pretrain.jsonl").read_text().splitlines()]
    assert [Run.from_dict(row["run"]) for row in rows] == runs
    assert str(tmp_path) not in (tmp_path / "results/pretrain.jsonl").read_text()
    for run, row in zip(runs, rows, strict=True):
        assert (row["loss"]["unseen"].keys() == {"exact"}) == (run.kind != "mosa")
        assert row["training_flops"] == 3 * 3 * 2 * run.forward_flops()
        assert row["sample"]["decoded"] == pytest.approx(row["sample"]["teacher_forced"], abs=1e-4)
        if run.kind == "stride" or (run.kind == "mosa" and run.routing == "expert_choice"):
            assert row["training_flops_of_selected"] == pytest.approx(row["training_flops"])
    (tmp_path / "results/pretrain.jsonl").write_text("\n".join(map(json.dumps, rows[1:])) + "\n")
    command.main(arguments)
    assert trained == [*runs, runs[0]]  # what is there is not trained again
    assert (tmp_path / "results/pretrain.png").read_bytes().startswith(b"\x89PNG")
    assert "| fixed stride |" in capsys.readouterr().out


def row(run: Run, exact: float, published: float | None = None) -> dict:
    loss = {"exact": exact} | ({} if published is None else {"expert_choice": published})
    return {
        "run": run.to_dict(),
        "loss": {"held out": loss, "unseen": {"exact": exact + 1}},
        "sample": {"teacher_forced": exact, "decoded": exact},
        "kv_bytes": {"dense": 100.0},
        "parameters": 10,
        "step_cpu_ms": 5.0,
        "training_flops": 1e12,
        "seconds": 60.0,
        **{
            "command": "python -m benchmarks.pretrain",
            "date": "2026-01-01",
            "machine": "one",
            "versions": {"torch": "2"},
        },
    }


def test_what_the_leak_explains(tmp_path):
    dense, mosa, threshold, stride, _ = kinds = headline(DENSE, MOSA, 8)
    studies = {HEADLINE: [dataclasses.replace(each, seed=seed) for seed in range(3) for each in kinds[:4]]}
    rows = []
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):

        def measured(run: Run, *losses: float, seed=seed) -> None:
            rows.append(row(dataclasses.replace(run, seed=seed), *losses))

        measured(dense, 3 + 9 * noise)
        measured(mosa, 2.9 + 10 * noise, 2.8 + 10 * noise)
        measured(stride, 2.95 + 10 * noise)
        if seed:
            measured(threshold, 3.001 + 9 * noise, 3.0 + 9 * noise)
    pretrain_page.write(studies, rows, tmp_path)
    page = unwrapped((tmp_path / "pretrain.md").read_text())
    sentences = re.findall(r"^\d\. (.*)$", page, re.MULTILINE)
    assert len(sentences) == 3
    assert "is -0.1000 ± 0.0248 nats" in sentences[0] and sentences[0].endswith("below it.")  # 4.303 · 0.01 / √3
    assert "is +0.0010 ± 0.0000 nats" in sentences[1] and sentences[1].endswith("above it.")
    assert "-0.2000 ± 0.0248" in sentences[2] and "50% of the gain" in sentences[2]
    assert re.search(
        r"^What choosing.*: -0.0500 ± 0.0000 \(MoSA, trained by expert choice; 3 seeds\)", page, re.MULTILINE
    )
    assert "**Missing**, 1 of 12 runs: MoSA, trained by threshold" in page and "seed 0." in page


def test_quantiles_are_those_of_the_t_distribution():
    for degrees, quantile in pretrain_page.T_95.items():
        points = torch.linspace(-quantile, quantile, 200_001, dtype=torch.float64)
        density = (
            torch.distributions.StudentT(torch.tensor(float(degrees), dtype=torch.float64)).log_prob(points).exp()
        )
        assert torch.trapezoid(density, points).item() == pytest.approx(0.95, abs=5e-5)


def test_the_page_is_that_of_its_rows():
    rows = list(pretrain_rows.read_rows(RESULTS / "pretrain.jsonl").values())
    assert (RESULTS / "pretrain.md").read_text(encoding="utf-8") == pretrain_page.page(PRESETS["cpu"](), rows)
    assert all(abs(row["sample"]["decoded"] - row["sample"]["teacher_forced"]) < 1e-4 for row in rows)
