"""Commands that are stopped, or asked for what cannot be: one line, which says what there is and names the option."""

import json

import pytest

from mosa_hf.cli import convert, evaluate, heal, run_convert, run_heal, run_trace, trace
from mosa_hf.conversion import checkpoint
from testing.tiny import QUIET, SENTENCES, byte_tokenizer, tiny_base

SIZES = "--windows 2 --window-length 64 --window 8 --device cpu".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with its tokenizer, its conversion, and a text."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_base(vocab_size=256).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "text.txt").write_text(SENTENCES)
    convert.main([str(folder / "base"), str(folder / "converted"), *SIZES])
    return folder


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_while_a_model_is_converted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_convert, "convert_files", interrupt)
    with pytest.raises(SystemExit, match="^mosa-convert: stopped. Nothing was written"):
        convert.main([str(folder / "base"), str(tmp_path / "new"), *SIZES])
    assert not list(tmp_path.iterdir())


def test_while_a_model_is_uploaded(folder, tmp_path, monkeypatch, capsys):
    """All that could be written before is."""
    monkeypatch.setattr(checkpoint, "check_can_publish", lambda *args: None)
    monkeypatch.setattr(run_convert, "publish", interrupt)
    plan = tmp_path / "plan.json"
    with pytest.raises(SystemExit, match=r"^mosa-convert: stopped. .*new is whole; what came after it was not done"):
        arguments = ["--push-to-hub", "someone/new", "--save-plan", str(plan)]
        convert.main([str(folder / "base"), str(tmp_path / "new"), *SIZES, *arguments])
    assert json.loads(plan.read_text()) and (tmp_path / "new" / "config.json").exists()
    assert "Uploaded" not in capsys.readouterr().out


@QUIET
@pytest.mark.parametrize(
    "reached, message", [(None, "begins anew: .*`--save_steps`"), (3, "goes on from .*checkpoint-3")]
)
def test_while_a_model_is_healed(reached, message, folder, tmp_path, monkeypatch):
    def train(self, **options):
        if reached is not None:
            (tmp_path / "runs" / f"checkpoint-{reached + 1}").mkdir(parents=True)  # which is not whole
            (tmp_path / "runs" / f"checkpoint-{reached}").mkdir()
            (tmp_path / "runs" / f"checkpoint-{reached}" / "trainer_state.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run_heal.HealingTrainer, "train", train)
    with pytest.raises(SystemExit, match=f"^mosa-heal: stopped. The same command {message}"):
        heal.main(healing(folder, tmp_path))
    assert not (tmp_path / "healed").exists()


def test_while_a_text_is_traced(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_trace, "run", interrupt)
    with pytest.raises(SystemExit, match="^mosa-trace: stopped. Nothing was written"):
        trace.main([str(folder / "converted"), "--text", str(folder / "text.txt"), "--html", str(tmp_path / "x.html")])


@QUIET
def test_options_are_named_as_they_are_typed(folder, tmp_path, capsys):
    text = ["--text", str(folder / "text.txt")]
    with pytest.raises(SystemExit, match="^mosa-evaluate: `--facts` must"):
        evaluate.main([str(folder / "converted"), *text, "--facts", "-1", "--context", "100", "--scored", "10"])
    with pytest.raises(SystemExit, match="^mosa-evaluate: `--card` writes into the model card.* no .*base/README.md"):
        evaluate.main([str(folder / "base"), *text, "--card"])
    with pytest.raises(SystemExit, match="^mosa-heal: `--text_characters` must"):
        heal.main([*healing(folder, tmp_path), "--text_characters", "0"])
    with pytest.raises(SystemExit):
        heal.main([*healing(folder, tmp_path), "--dtype", "nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def healing(folder, tmp_path) -> list[str]:
    options = "--window_length 64 --max_steps 1 --use_cpu --report_to none --disable_tqdm true".split()
    places = ["--destination", str(tmp_path / "healed"), "--output_dir", str(tmp_path / "runs")]
    return ["--model", str(folder / "converted"), "--text", str(folder / "text.txt"), *places, *options]
