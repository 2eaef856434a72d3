"""Expert choice reads the future and thresholds do not, shown on tokens that nothing else can predict."""

import pytest
import torch

from benchmarks import leak

pytestmark = pytest.mark.slow  # models are trained

STEPS = 50


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], leak.Excess]:
    return leak.probe(seed=0, num_steps=STEPS)


def test_expert_choice_leaks(results):
    """The probe is sensitive: it finds the leak that is there."""
    excess = results["expert_choice", "expert_choice"]
    assert excess.leaks and excess.mean < -0.02


@pytest.mark.parametrize("trained", ["expert_choice", "threshold"])
def test_thresholds_do_not(trained, results):
    """Whatever a model was trained with, no threshold lets it get below the entropy of the tokens."""
    excess = results[trained, "threshold"]
    assert not excess.leaks
    assert excess.error < 0.005  # small enough that a leak would have shown


def test_command_tells_a_leak_from_none(results, monkeypatch, tmp_path, capsys):
    """It succeeds for these results, fails if thresholds leak or expert choice does not, and writes what it prints."""
    output = tmp_path / "leak.md"
    arguments = ["--seeds", "0", "--steps", str(STEPS), "--output", str(output)]
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # the command's process has one; this has more
    monkeypatch.setattr(leak, "probe", lambda seed, num_steps: results)
    assert leak.main(arguments) == 0
    table = capsys.readouterr().out.strip()
    assert table in output.read_text(encoding="utf-8") and str(results["threshold", "threshold"]) in table
    for case in leak.CASES:
        other = leak.Excess(0.0, 0.001) if results[case].leaks else leak.Excess(-0.01, 0.001)
        monkeypatch.setattr(leak, "probe", lambda seed, num_steps, case=case, other=other: {**results, case: other})
        assert leak.main(arguments) == 1
