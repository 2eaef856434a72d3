"""Plans by measured effect: derivatives against finite differences, what a search finds, and that it goes on."""

import json
from dataclasses import replace

import pytest
import torch

from mosa_hf import ConversionConfig, GroupPlan, convert_model
from mosa_hf.cli import plan as command
from mosa_hf.conversion.allocation import candidate_plan
from mosa_hf.conversion.calibration import fit_routers
from mosa_hf.conversion.effects import Effects, divergence
from mosa_hf.conversion.planning import WINDOWS, PlanningConfig, Rates, Setting, exchange, measured_texts, search_plan
from mosa_hf.modeling.family import family_of
from mosa_hf.modeling.group_plan import SparseGroup
from mosa_hf.modeling.layers import output_projection_of
from testing.decoders import classes_of, shaken, small_config
from testing.tiny import QUIET, byte_tokenizer, random_tokens, tiny_base

TOKENS = 96


def effects_of(family: str, plan: SparseGroup, **fields) -> tuple[Effects, GroupPlan]:
    """Of a tiny model on two texts, and the plan with such groups wherever they can be."""
    model, calibration = tiny_base(family, **fields), random_tokens(4, 48)
    config = family_of(family).config_class.from_base(model.config)
    candidates = candidate_plan(config, ConversionConfig(window=plan.window, sparsity=plan.sparsity))
    fits = fit_routers(model, calibration, candidates)
    return Effects(model, fits, candidates, random_tokens(2, TOKENS, seed=3), positions=16), candidates


def everywhere(plan: GroupPlan, kind: SparseGroup) -> GroupPlan:
    return GroupPlan(tuple(tuple(group and kind for group in groups) for groups in plan.layers))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_divergence_of_a_plan(family):
    """That of the converted model; none where everything is kept."""
    effects, plan = effects_of(family, SparseGroup(8, 4.0))
    with torch.no_grad():
        for row, found in enumerate(effects.of(plan)):
            ids = effects.texts[row : row + 1]
            models = effects.model, effects.with_plan(plan)
            logits, converted = (model(ids, use_cache=False).logits[0] for model in models)
            logits, converted = (each[effects.position].log_softmax(-1) for each in (logits, converted))
            expected = (logits.exp() * (logits - converted)).sum(-1).mean()
            assert found == pytest.approx(float(expected), rel=1e-4) and found > 0.01
    assert max(effects.of(everywhere(plan, SparseGroup(8, 1.0)))) < 1e-5
    assert max(effects.of(everywhere(plan, SparseGroup(TOKENS, 4.0)))) < 1e-5


def test_a_model_in_training_is_measured_in_evaluation():
    effects, plan = effects_of("llama", SparseGroup(8, 1.0), attention_dropout=0.5)
    effects.model.train()
    assert max(effects.of(plan)) < 1e-5
    assert all(module.training for module in effects.model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "deepseek_v3"])
def test_effects_of_moves(family):
    """
    The derivative with respect to a gate between what a group's heads give and what they would give, by finite
    differences at the input of the layer's output projection.
    """
    effects, plan = effects_of(family, SparseGroup(8, 4.0))
    moves = [everywhere(plan, SparseGroup(24, 4.0)), everywhere(plan, SparseGroup(8, 2.0))]
    found = list(effects.of_moves(plan, moves))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in effects.model.parameters())
    row = 1
    ids, expected = effects.texts[row : row + 1], effects.expected(row)

    def projections(model):
        return {x.layer_idx: output_projection_of(x) for x in model.modules() if hasattr(x, "mosa_router")}

    def heads(model, layer):
        """What the layer's heads give."""
        seen = []
        handle = projections(model)[layer].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(ids, use_cache=False)
        handle.remove()
        return seen[0]

    model = effects.with_plan(plan)
    with torch.no_grad():
        for i, move in enumerate(moves):
            for layer, groups in enumerate(plan.layers):
                for group in range(len(groups)):
                    if groups[group] is None:
                        assert found[row][i, layer, group] == 0
                        continue
                    alone = list(plan.layers)
                    alone[layer] = move.layers[layer]
                    change = heads(effects.with_plan(GroupPlan(tuple(alone))), layer) - heads(model, layer)
                    own = torch.zeros_like(change).unflatten(-1, (len(groups), -1))
                    own[..., group, :] = change.unflatten(-1, (len(groups), -1))[..., group, :]
                    values = []
                    for gate in (-1e-3, 1e-3):
                        handle = projections(model)[layer].register_forward_pre_hook(
                            lambda module, args, gate=gate, own=own: (args[0] + gate * own.flatten(-2),)
                        )
                        logits = model(ids, use_cache=False).logits[0]
                        values.append(float(divergence(logits[effects.position].double(), expected)))
                        handle.remove()
                    slope = (values[1] - values[0]) / 2e-3
                    assert float(found[row][i, layer, group]) == pytest.approx(slope, abs=2e-3, rel=0.05)


def test_layers_may_differ_in_groups():
    (config_class, model_class), fields = classes_of("gemma4_text"), small_config("gemma4_text").to_dict()
    fields["layer_types"] = ["sliding_attention", "full_attention"] * 3
    fields["per_layer_config"] = {layer: {"head_dim": 16, "num_key_value_heads": 4} for layer in (1, 3, 5)}
    model = shaken(model_class(config_class(**fields)))
    found = search_plan(
        model,
        PlanningConfig(share=0.5, num_tokens=TOKENS, rounds=1),
        random_tokens(4, 48),
        random_tokens(2, TOKENS, seed=3),
    )
    assert {len(groups) for groups in found.plan.layers} == {2, 4}
    assert found.divergence <= found.uniform_divergence and found.share <= 0.5


def test_exchange():
    """Those that gain most by byte take from those that lose least, and no more than they give."""
    up, down = [-8.0, -2.0, -4.0, -0.5, 0.0], [9.0, 3.0, 5.0, 1.0, 0.5]
    effects, costs = torch.tensor([up, down]), torch.tensor([[1.0] * 5, [-1.0] * 5])
    assert exchange(effects, costs, 5) == {0: 0, 2: 0, 3: 1, 4: 1}
    assert exchange(effects, costs, 2) == {0: 0, 4: 1}
    # Where nothing is to be gained, nothing moves; what gains and gives bytes back moves at once.
    assert exchange(torch.tensor([[-1.0, -1.0], [2.0, 2.0]]), costs[:, :2], 2) == {}
    assert exchange(torch.tensor([[3.0, 3.0], [-2.0, 2.0]]), costs[:, :2], 2) == {0: 1}
    chance = torch.Generator().manual_seed(0)
    for seed in range(20):
        effects, costs = torch.randn(4, 30, generator=chance), torch.rand(4, 30, generator=chance)
        costs[1::2] *= -1
        chosen = exchange(effects, costs, 10 + seed)
        assert 1 < len(chosen) <= 10 + seed
        assert sum(float(costs[move, group]) for group, move in chosen.items()) <= 0


def test_rates_meet_a_share():
    """To less than a token of each calibration window; groups whose threshold is lower select more."""
    effects, candidates = effects_of("llama", SparseGroup(8, 4.0))
    planning = PlanningConfig(share=0.3, num_tokens=TOKENS)
    rates = Rates(planning, candidates, effects.fits)
    alike = dict.fromkeys(rates.logits, Setting(0))
    plan = rates.plan(alike, rates.threshold(alike))
    assert 0.29 < rates.share(plan) <= 0.3
    assert {kind.window for groups in plan.layers for kind in groups} == {16}
    lower = {pair: Setting(0, float(pair[0] == 1)) for pair in alike}
    other = rates.plan(lower, rates.threshold(lower))
    assert 0.29 < rates.share(other) <= 0.3
    for layer, (before, after) in enumerate(zip(plan.layers, other.layers, strict=True)):
        for i, kind in enumerate(before):
            assert (after[i].sparsity < kind.sparsity) == (layer == 1)
    assert rates.threshold(dict.fromkeys(alike, Setting(2))) is None  # 32 of 96 tokens are more


SEARCH = PlanningConfig(share=0.4, num_tokens=2 * TOKENS, rounds=4)


def unequal_base():
    """A model of four layers, in each of which the second of two groups says little."""
    model = tiny_base(num_hidden_layers=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.unflatten(1, (2, -1))[:, 1] *= 0.1
    return model


def searched(directory=None, planning=SEARCH, fits=None):
    texts = random_tokens(3, 2 * TOKENS, seed=5)
    return search_plan(unequal_base(), planning, random_tokens(6, 96), texts, fits=fits, directory=directory)


def misleading_fits():
    """Routers of the model's groups that compare layers on a wrong scale, which a search has to find out."""
    fits = fit_routers(unequal_base(), random_tokens(6, 96), GroupPlan.uniform(4, 2, SparseGroup(8, 4)))
    return [replace(fit, predicted=fit.predicted - fit.offset) for fit in fits]


def test_search_beats_the_best_uniform_plan():
    """At the same bytes, also on texts that it never saw, and as conversion makes the model."""
    found = searched(fits=misleading_fits())
    assert searched(planning=replace(SEARCH, rounds=0)).divergence < 0.5 * found.uniform_divergence  # the right scale
    assert 0.39 < found.share <= 0.4
    assert found.divergence < 0.8 * found.uniform_divergence
    assert len({kind.window for groups in found.uniform.layers for kind in groups}) == 1
    kept = torch.tensor([[kind.kept_share(2 * TOKENS) for kind in groups] for groups in found.plan.layers])
    assert kept.mean(0)[0] > 1.2 * kept.mean(0)[1]  # of those that matter
    model, calibration = unequal_base(), random_tokens(6, 96)
    unseen = random_tokens(6, 2 * TOKENS, seed=7)
    divergences, selected = [], []
    with torch.no_grad():
        expected = model(unseen).logits[:, TOKENS:].log_softmax(-1)
        for plan in (found.plan, found.uniform):
            converted = convert_model(model, ConversionConfig(plan=plan), calibration)
            assert GroupPlan.of_config(converted.config) == plan
            actual = converted(unseen, use_cache=False).logits[:, TOKENS:].log_softmax(-1)
            divergences.append(float((expected.exp() * (expected - actual)).sum(-1).mean()))
            selected.append(sum(kind.kept_share(2 * TOKENS) for groups in plan.layers for kind in groups))
    assert divergences[0] < 0.9 * divergences[1]
    assert selected[0] == pytest.approx(selected[1], rel=0.01)


def test_a_search_begins_at_the_best_window():
    """Of all on the scale, at the same bytes."""
    planning = replace(SEARCH, rounds=0)
    found = searched(planning=planning)
    assert found.plan == found.uniform and found.divergence == found.uniform_divergence
    model, calibration = unequal_base(), random_tokens(6, 96)
    candidates = GroupPlan.uniform(4, 2, SparseGroup(8, 4))
    fits = fit_routers(model, calibration, candidates)
    effects = Effects(model, fits, candidates, random_tokens(3, 2 * TOKENS, seed=5))
    rates, divergences = Rates(planning, candidates, fits), {}
    for i, window in enumerate(WINDOWS):
        settings = dict.fromkeys(rates.logits, Setting(i))
        if (threshold := rates.threshold(settings)) is not None:
            each = list(effects.of(rates.plan(settings, threshold)))
            divergences[window] = sum(each) / len(each)
    assert len(divergences) == 5  # 16 to 64 tokens; 96 of 192 are more than the share
    assert found.uniform.layers[0][0].window == min(divergences, key=divergences.get)
    assert found.uniform_divergence == pytest.approx(min(divergences.values()))


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    planning = replace(SEARCH, rounds=2)
    whole = searched(planning=planning)
    measured = []
    original = Effects._logits

    def until(number):
        def logits(self, model, row):
            if len(measured) == number:
                raise KeyboardInterrupt
            measured.append(row)
            return original(self, model, row)

        return logits

    monkeypatch.setattr(Effects, "_logits", until(17))
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path, planning)
    monkeypatch.setattr(Effects, "_logits", until(24))
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path, planning)
    monkeypatch.setattr(Effects, "_logits", original)
    fitted = []
    monkeypatch.setattr("mosa_hf.conversion.planning.fit_routers", lambda *args, **kwargs: fitted.append(args))
    assert searched(tmp_path, planning) == whole and not fitted
    # All of it is known now.
    monkeypatch.setattr(Effects, "_logits", until(len(measured)))
    assert searched(tmp_path, planning) == whole
    with pytest.raises(ValueError, match="measured.json is of a search with other settings"):
        searched(tmp_path, replace(planning, share=0.41))


def test_routers_of_another_search_are_not_used(tmp_path, monkeypatch):
    """Of one that was interrupted before it had measured anything."""

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Effects, "_logits", interrupted)
        searched(tmp_path)
    assert (tmp_path / "routers.safetensors").exists()
    with pytest.raises(ValueError, match="measured.json is of a search with other settings, texts, or another model"):
        searched(tmp_path, replace(SEARCH, rounds=1, include_first=False))
    other = unequal_base()
    other.model.layers[1].self_attn.k_proj.weight.data.mul_(1.5)  # and the same config
    with pytest.raises(ValueError, match="measured.json is of a search with other settings, texts, or another model"):
        search_plan(other, SEARCH, random_tokens(6, 96), random_tokens(3, 2 * TOKENS, seed=5), directory=tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"share": 0}, "`share` must be above 0 and at most 1, got 0"),
        ({"share": 1.5}, "`share` must be above 0 and at most 1, got 1.5"),
        ({"share": 0.5, "step": 0}, "`step` must be above 0"),
        ({"share": 0.5, "num_tokens": 1}, "`num_tokens` must be at least 2, got 1"),
        ({"share": 0.5, "rounds": -1}, "`rounds` must be at least 0"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PlanningConfig(**fields)


def test_a_share_that_no_plan_meets():
    with pytest.raises(ValueError, match="`share=0.05` of 192 tokens is less than a window of 16 tokens"):
        searched(planning=PlanningConfig(share=0.05, num_tokens=2 * TOKENS))


def test_texts():
    """Stretches of the text; the last one is read again."""
    tokenizer, text = byte_tokenizer(), " ".join(f"the {i}th word of a text;" for i in range(60))
    texts = measured_texts(tokenizer, text, 3, 101)
    assert texts.shape == (3, 101)
    assert torch.equal(texts[2, :50], texts[2, 51:])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    stretches = ids.unfold(0, 101, 1).tolist()
    assert [row in stretches for row in texts.tolist()] == [True, True, False]
    assert texts[2, :51].tolist() in ids.unfold(0, 51, 1).tolist()
    with pytest.raises(ValueError, match="fewer than one window of 5000"):
        measured_texts(tokenizer, text, 3, 5000)


@QUIET
def test_command(tmp_path, capsys):
    source, text, destination = tmp_path / "source", tmp_path / "text.jsonl", tmp_path / "plan.json"
    tiny_base().save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    rows = ({"text": f"the {i}th word of a text that is long enough;"} for i in range(80))
    text.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = [str(source), str(destination), "--share", "0.5", "--text", str(text), "--texts", "2", "--rounds", "1"]
    arguments += ["--windows", "2", "--window-length", "64"]
    uniform, picture = tmp_path / "uniform.json", tmp_path / "plan.png"
    with pytest.raises(SystemExit, match="mosa-plan: "):  # a folder: what was measured is still there
        command.main([*arguments, "--tokens", "128", "--uniform", str(source)])
    assert not destination.exists() and (tmp_path / "plan.json.search" / "measured.json").exists()
    command.main([*arguments, "--tokens", "128", "--plot", str(picture), "--uniform", str(uniform)])
    plan, printed = GroupPlan.load(destination), capsys.readouterr().out
    assert str(plan) in printed and "Divergence from the original" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (source, text, destination, uniform, picture)
    }
    assert len({kind.window for groups in GroupPlan.load(uniform).layers for kind in groups}) == 1
    converted = convert_model(tiny_base(), ConversionConfig(plan=destination), random_tokens(2, 64))
    assert GroupPlan.of_config(converted.config) == plan
    for wrong, message in (
        ([*arguments, "--tokens", "128"], "plan.json exists"),
        ([*arguments[:1], str(tmp_path / "other.json"), *arguments[2:], "--tokens", "9000"], "fewer than one window"),
        ([*arguments[:1], str(tmp_path / "other.json"), "--share", "2", *arguments[4:]], "`--share` must be above 0"),
    ):
        with pytest.raises(SystemExit, match=f"mosa-plan: .*{message}"):
            command.main(wrong)
    assert not (tmp_path / "other.json").exists()
