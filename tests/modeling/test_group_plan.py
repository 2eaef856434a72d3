"""Group plans: files, what is refused, and how they are shown."""

import json
import sys

import pytest

from mosa_hf import GroupPlan, MosaGemma2Config, MosaLlamaConfig
from mosa_hf.modeling.group_plan import SparseGroup

NEAR, FAR = SparseGroup(window=512, sparsity=16), SparseGroup(window=64, sparsity=2.5)
PLAN = GroupPlan(((None, NEAR), (FAR, FAR), (None, None)))


def test_files(tmp_path):
    path = tmp_path / "new" / "plan.json"
    PLAN.save(path)
    assert GroupPlan.load(path) == PLAN
    assert len(path.read_text().splitlines()) == 2 + 1 + 3 + 1  # a line for each layer, to be edited by hand
    GroupPlan(((NEAR,),)).save(path)
    assert GroupPlan.load(path) == GroupPlan(((NEAR,),))
    assert [each.name for each in path.parent.iterdir()] == ["plan.json"]
    assert GroupPlan.from_list(json.loads(json.dumps(PLAN.to_list()))) == PLAN


def test_plans_of_lists_are_those_of_tuples():
    of_lists = [GroupPlan([[None, NEAR], [FAR, FAR], [None, None]]), GroupPlan(tuple(map(list, PLAN.layers)))]
    assert of_lists == [PLAN, PLAN] and {*of_lists, PLAN} == {PLAN}
    groups = [NEAR]
    plan = GroupPlan([groups])
    groups.append(None)  # of no plan any more
    assert plan == GroupPlan(((NEAR,),))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "plan.json: Expecting"),
        ("[]", 'plan.json: a plan is a JSON object with one entry, "layers"'),
        ('{"layers": [], "window": 3}', "plan.json: a plan is a JSON object"),
        ('{"layers": {"0": []}}', "plan.json: A plan must be a list of layers"),
        ('{"layers": [null]}', "plan.json: A plan must be a list of layers"),
        (
            '{"layers": [[null, 8]]}',
            "Layer 0, group 1 of the plan must be null or have `window` and `sparsity`, got 8",
        ),
        ('{"layers": [[], [{"window": 8}]]}', "Layer 1, group 0 of the plan must be null or have"),
        ('{"layers": [[{"window": -1, "sparsity": 2}]]}', "Layer 0, group 0 of the plan: `window` must be an integer"),
        (
            '{"layers": [[{"window": 8.5, "sparsity": 2}]]}',
            r"`window` must be an integer of at least 0 and below 2\*\*63, got 8.5",
        ),
        (
            '{"layers": [[{"window": true, "sparsity": 2}]]}',
            r"`window` must be an integer of at least 0 and below 2\*\*63, got True",
        ),
        ('{"layers": [[{"window": 9223372036854775808, "sparsity": 2}]]}', r"below 2\*\*63, got 9223372036854775808"),
        ('{"layers": [[{"window": 8, "sparsity": 0.5}]]}', "`sparsity` must be a finite number of at least 1"),
        ('{"layers": [[{"window": 8, "sparsity": NaN}]]}', "`sparsity` must be a finite number of at least 1"),
        ('{"layers": [[{"window": 8, "sparsity": Infinity}]]}', "`sparsity` must be a finite number of at least 1"),
        (
            '{"layers": [[{"window": 8, "sparsity": "2"}]]}',
            "`sparsity` must be a finite number of at least 1, got '2'",
        ),
    ],
)
def test_files_that_are_refused(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        GroupPlan.load(tmp_path / "plan.json")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="plan.json"):
        GroupPlan.load(tmp_path / "plan.json")


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    PLAN.save(tmp_path / "plan.json")

    def interrupt(self, text, encoding):
        with self.open("w") as file:
            file.write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        GroupPlan(((NEAR,),)).save(tmp_path / "plan.json")
    assert GroupPlan.load(tmp_path / "plan.json") == PLAN
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_plans_and_models():
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MosaLlamaConfig(**shape, mosa_plan=PLAN.to_list())
    assert [config.groups_of_layer(layer) for layer in range(3)] == list(PLAN.layers)
    plain = MosaLlamaConfig(**shape, mosa_window=64, mosa_sparsity=2.5)
    assert tuple(plain.groups_of_layer(layer) for layer in range(3)) == GroupPlan.uniform(3, 2, FAR).layers
    with pytest.raises(ValueError, match="The plan has 3 layers, but the model has 4"):
        PLAN.validate([2] * 4, [None] * 4)
    with pytest.raises(ValueError, match="The plan names 2 groups in layer 0, but the model has 3"):
        PLAN.validate([3] * 3, [None] * 3)
    with pytest.raises(ValueError, match="groups of layer 1 sparse, but its attention has a sliding window"):
        PLAN.validate([2] * 3, [None, "its attention has a sliding window", None])
    sliding = MosaGemma2Config(**shape, mosa_window=64, mosa_sparsity=2.5)  # every other layer of Gemma 2 slides
    dense = [layer for layer in range(3) if sliding.stays_dense(layer)]
    assert dense == [0, 2]
    assert tuple(map(sliding.groups_of_layer, range(3))) == GroupPlan.uniform(3, 2, FAR, dense).layers


def test_table():
    assert str(PLAN).split("\n") == [
        "  layer  group 0  group 1",
        "      0    dense   512/16",
        "      1   64/2.5   64/2.5",
        "      2    dense    dense",
        "3 of 6 groups sparse (window/sparsity)",
    ]
    assert PLAN.sparse_pairs() == [(0, 1), (1, 0), (1, 1)]


def test_kept_share():
    assert NEAR.kept_share(512) == NEAR.kept_share(10) == 1
    assert NEAR.kept_share(512 + 1600) == (512 + 100) / 2112


@pytest.mark.slow
def test_picture(tmp_path, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    PLAN.plot(tmp_path / "plan.png")
    GroupPlan(((NEAR, NEAR), (NEAR, NEAR), (NEAR, NEAR))).plot(tmp_path / "other.png")
    pixels, other = image.imread(tmp_path / "plan.png"), image.imread(tmp_path / "other.png")
    assert pixels.shape == other.shape and min(pixels.shape[:2]) > 100 and (pixels != other).mean() > 0.1
    GroupPlan(((NEAR, NEAR), (NEAR,))).plot(tmp_path / "ragged.png")  # layers may differ in how many groups they have
    assert (tmp_path / "ragged.png").exists()
    for layers in ((), ((), ())):
        with pytest.raises(ValueError, match="The plan names no groups"):
            GroupPlan(layers).plot(tmp_path / "third.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mosa-hf\[plot\]'"):
        PLAN.plot(tmp_path / "third.png")
    assert not (tmp_path / "third.png").exists()
