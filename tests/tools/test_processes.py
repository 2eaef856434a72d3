"""Two processes: an original and a converted model train sharded (FSDP2) and replicated (DDP) by `accelerate launch`,
run in tensor parallelism, and are saved as ever."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..modeling.test_parallel import in_two_processes
from .conftest import Folders, plain_shell

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes share a CPU"),
]

TOKENS = torch.randint(2, 256, (16, 24), generator=torch.Generator().manual_seed(0))  # as the script's
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
    trained = {"mosa_gate_slope": 1.0, "mosa_threshold_momentum": 0.9}  # routers learn, thresholds follow
    AutoModelForCausalLM.from_pretrained(folders.converted, **trained).save_pretrained(routers)
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
    with torch.no_grad():
        return model, model(TOKENS, use_cache=False).logits, torch.load(folder / "logits.pt")


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


def tensor_parallel(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """Logits of each model in `folder`, split between the processes and then saved to "<its name>_saved"."""
    logits = {}
    for name in Folders._fields:
        model = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto")
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
        with torch.no_grad():
            logits[name] = model(TOKENS, use_cache=False).logits
        model.save_pretrained(folder / f"{name}_saved")
    return logits


def test_saving_a_tensor_parallel_model(folders, tmp_path):
    for name, folder in folders._asdict().items():
        (tmp_path / name).symlink_to(folder)
    logits = in_two_processes(tensor_parallel, tmp_path)
    for name, folder in folders._asdict().items():
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}_saved")
        with torch.no_grad():
            assert (saved(TOKENS, use_cache=False).logits - logits[name]).abs().max() < 1e-4
        expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert saved.state_dict().keys() == expected.keys()
        assert all(torch.equal(states, expected[key]) for key, states in saved.state_dict().items())
