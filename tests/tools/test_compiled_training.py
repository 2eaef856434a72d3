"""`Trainer(torch_compile=True)`: a converted model trains compiled as it trains uncompiled, in as many graphs as the
original. `benchmarks/speed/compile_training.py` prints how long that takes to compile."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from testing.tiny import random_tokens

pytestmark = [pytest.mark.tools, pytest.mark.usefixtures("fresh_compiler")]

STEPS = 4


class Tokens(Dataset):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = random_tokens(32, seed=index)
        return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def losses(model: PreTrainedModel, folder, **options) -> torch.Tensor:
    """The loss of each step of training, and of an evaluation after it."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens(), eval_dataset=Tokens())
    trainer.train()
    evaluation = trainer.evaluate()["eval_loss"]
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [evaluation])


@pytest.mark.parametrize("slope", [0.0, 1.0], ids=["frozen routers", "trained routers"])
def test_trainer(slope, folders, tmp_path):
    graphs = []
    for folder, options in ((folders.original, {}), (folders.converted, {"mosa_gate_slope": slope})):
        expected = losses(AutoModelForCausalLM.from_pretrained(folder, **options), tmp_path)
        assert not torch._dynamo.utils.counters["stats"]
        compile_options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
        actual = losses(AutoModelForCausalLM.from_pretrained(folder, **options), tmp_path, **compile_options)
        assert (actual - expected).abs().max() < 1e-3, (actual, expected)
        counters = torch._dynamo.utils.counters
        graphs.append((counters["stats"]["unique_graphs"], dict(counters["graph_break"])))
        torch._dynamo.reset()
        counters.clear()
    assert graphs[0][0] and graphs[0] == graphs[1] and not graphs[1][1], graphs
