"""
The leak probe: does a rule of routing let a model read the future? `python -m benchmarks.leak`

Tokens are drawn uniformly, each independently of all others. Nothing that precedes a token tells anything about it, so
no causal model can have an expected loss below the entropy log V, whatever it learned. Small native models are trained
on such tokens and read fresh ones. Under expert choice, whether a token is selected depends on how many *later* tokens
score higher, and MoSA heads add something to a token where it is selected and nothing where it is not: the
residual stream knows the bit, and the prediction of the next token uses it. Under thresholds there is no such bit.

Prints a table, one row for each rule of training and of reading, and writes it to `benchmarks/results/leak.md`; with
`--output -` it prints only. It fails if expert choice does not leak, or anything causal does.
"""

import argparse
import datetime
import math
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

from mosa_hf import MosaConfig, MosaForCausalLM
from mosa_hf.atomic_write import atomic_file
from testing.markdown import wrapped

RESULTS = Path(__file__).parent / "results" / "leak.md"
VOCAB_SIZE, LENGTH, BATCH_SIZE = 4, 16, 128
FLOOR = math.log(VOCAB_SIZE)
NOISE = 3  # standard errors that chance may put a loss below the floor
NUM_READ = 4096  # fresh sequences
CASES = (("expert_choice", "expert_choice"), ("expert_choice", "threshold"), ("threshold", "threshold"))


class Excess(NamedTuple):
    """Loss on fresh tokens minus the floor, nats a token, and its standard error."""

    mean: float
    error: float

    @property
    def leaks(self) -> bool:
        return self.mean < -NOISE * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.5f} ± {self.error:.5f}"


def random_tokens(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """`[num_rows, LENGTH]`, uniform and independent."""
    return torch.randint(VOCAB_SIZE, (num_rows, LENGTH), generator=generator)


def trained_model(routing: str, seed: int, num_steps: int) -> MosaForCausalLM:
    """A small model, trained on tokens that no step sees twice."""
    torch.manual_seed(seed)
    config = MosaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_mosa_heads=16,
        mosa_sparsity=4,
        mosa_routing=routing,
        mosa_threshold_momentum=0.95,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MosaForCausalLM(config).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=num_steps)
    for _ in range(num_steps):
        input_ids = random_tokens(BATCH_SIZE, generator)
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def excess_loss(model: MosaForCausalLM, rule: str) -> Excess:
    """How far `model`, reading by `rule`, is above the floor on fresh sequences, teacher-forced."""
    config = type(model.config).from_dict({**model.config.to_dict(), "mosa_inference_routing": rule})
    reader = MosaForCausalLM(config).eval()
    reader.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1_000_000)  # no training's
    losses = []
    for rows in random_tokens(NUM_READ, generator).split(256):
        logits = reader(rows, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1))
    losses = torch.cat(losses)  # of sequences, which are independent; tokens of one are not
    return Excess(losses.mean().item() - FLOOR, losses.std().item() / math.sqrt(NUM_READ))


def probe(seed: int, num_steps: int) -> dict[tuple[str, str], Excess]:
    """Rule of training and rule of reading → excess loss."""
    models = {rule: trained_model(rule, seed, num_steps) for rule in ("expert_choice", "threshold")}
    return {(trained, read): excess_loss(models[trained], read) for trained, read in CASES}


def markdown(results: dict[int, dict[tuple[str, str], Excess]]) -> str:
    """A row for each case, a column for each seed."""
    lines = ["| trained with | read with |" + "".join(f" seed {seed} |" for seed in results)]
    lines.append("|---|---|" + "---:|" * len(results))
    for case in CASES:
        names = [rule.replace("_", " ") for rule in case]
        lines.append("| " + " | ".join([*names, *(str(result[case]) for result in results.values())]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of training, 128 sequences each")
    parser.add_argument("--output", default=str(RESULTS), help="file for the table; '-' for none")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {seed: probe(seed, options.steps) for seed in options.seeds}
    table = markdown(results)
    print(table)
    if options.output != "-":
        text = (
            "# Does routing read the future?\n\n"
            f"`python -m benchmarks.leak --steps {options.steps}` on {datetime.date.today()}, {os.cpu_count()} x "
            f"{platform.machine()}, one thread, torch {torch.__version__}, Transformers "
            f"{transformers.__version__}.\n\n"
            f"Loss minus log {VOCAB_SIZE} on fresh uniformly random tokens, nats a token, ± its standard error. Only "
            "what reads the future can be below 0 by more than noise.\n\n" + table
        )
        with atomic_file(Path(options.output)) as unfinished:
            unfinished.write_text(wrapped(text), encoding="utf-8")
    return int(
        any(excess.leaks != (case == CASES[0]) for result in results.values() for case, excess in result.items())
    )


if __name__ == "__main__":
    sys.exit(main())
