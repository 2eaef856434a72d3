"""`accelerate launch` with several processes: sharded (FSDP2) and replicated (DDP) training of an original and a
converted model, which both save and load as ever."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .conftest import Folders, plain_shell

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes share a CPU"),
]

SCRIPT = Path(__file__).with_name("parallel_training.py")
# "MULTI_GPU" is Accelerate's word for processes of torchrun; the script says that they compute on the CPU.
CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
"""
FSDP2 = """\
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
  fsdp_reshard_after_forward: true
"""


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory) -> dict[str, Path]:
    """Where the script left the models that each kind of parallelism trained, "trained_routers" among them."""
    root = tmp_path_factory.mktemp("trained")
    routers = root / "trained_routers"
    AutoModelForCausalLM.from_pretrained(folders.converted, mosa_gate_slope=1.0).save_pretrained(routers)
    results = {}
    for name, config in {"ddp": CONFIG.format(kind="MULTI_GPU"), "fsdp2": CONFIG.format(kind="FSDP") + FSDP2}.items():
        results[name] = root / name
        results[name].mkdir()
        (root / f"{name}.yaml").write_text(config)
        plain_shell(
            "accelerate", "launch", "--config_file", root / f"{name}.yaml", SCRIPT, results[name], *folders, routers
        )
    return results


def loaded(folder: Path) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """A model that a script saved, its logits on the training tokens, and those that it had when it was saved."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(2, 256, (16, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model, model(tokens, use_cache=False).logits, torch.load(folder / "logits.pt")


@pytest.mark.parametrize("name", [*Folders._fields, "trained_routers"])
def test_accelerate_launch(name, folders, trained):
    """Both kinds train the same model, which loads to the logits that it was saved with."""
    results = {kind: loaded(folder / name) for kind, folder in trained.items()}
    for _, actual, expected in results.values():
        assert (actual - expected).abs().max() < 1e-4
    assert (results["ddp"][1] - results["fsdp2"][1]).abs().max() < 1e-4

    source = folders.original if name == "original" else folders.converted
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    moved = {key for key, states in results["fsdp2"][0].state_dict().items() if not torch.equal(states, before[key])}
    assert any("q_proj" in key for key in moved)
    learns = {key.rsplit(".", 1)[1] for key in moved if "router" in key}
    assert learns == ({"weight", "threshold"} if name == "trained_routers" else set())
