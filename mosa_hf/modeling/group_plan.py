"""Group plans: every layer's groups, dense, or sparse with a window and a sparsity (docs/design.md, section 6)."""

import importlib.util
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import check_argument, checked
from ..atomic_write import atomic_file


@dataclass(frozen=True)
class SparseGroup:
    """
    A sparse key/value group.

    Args:
        window: tokens that a query reads whether selected or not, itself included.
        sparsity: ρ ≥ 1, one token in ρ is selected.

    Raises:
        ValueError: naming the field that is out of range.
    """

    window: int
    sparsity: float

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or not 0 <= self.window < 2**63:
            raise ValueError(f"`window` must be an integer of at least 0 and below 2**63, got {self.window!r}.")
        is_number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        if not is_number or not 1 <= self.sparsity < math.inf:
            raise ValueError(f"`sparsity` must be a finite number of at least 1, got {self.sparsity!r}.")

    @checked()
    def kept_share(self, num_tokens: int, rate: float | None = None, budget: int | None = None) -> float:
        """
        The share of `num_tokens` tokens that a cache keeps: the window, and what is selected of the rest.

        Args:
            num_tokens: of one sequence, at least 1.
            rate: share of the tokens that is selected, 0 to 1; None: 1 / ρ.
            budget: `mosa_cache_budget`, at least 1.

        Raises:
            ValueError: for an argument out of range.
        """
        if num_tokens < 1:
            raise ValueError(f"`num_tokens` must be at least 1, got {num_tokens}.")
        if rate is not None and not 0 <= rate <= 1:
            raise ValueError(f"`rate` must be a share of the tokens, 0 to 1, got {rate}.")
        if budget is not None and budget < 1:
            raise ValueError(f"`budget` must be at least 1, or None to keep every selected token, got {budget}.")
        near = min(self.window, num_tokens)
        far = (num_tokens - near) * (1 / self.sparsity if rate is None else rate)
        return (near + min(far, math.inf if budget is None else budget)) / num_tokens


def sparse_among(groups: Sequence[SparseGroup | None]) -> list[int]:
    """The sparse ones among the groups of a layer, by index."""
    return [group for group, kind in enumerate(groups) if kind is not None]


@dataclass(frozen=True)
class GroupPlan:
    """
    What every key/value group of a model is. `print(plan)` shows it as a table, `plan.plot(path)` as a picture.

    Args:
        layers: for each layer, what each of its groups is; None: dense.

    Raises:
        ValueError: naming layer and group, for what is neither.
    """

    layers: tuple[tuple[SparseGroup | None, ...], ...]

    def __post_init__(self) -> None:
        check_argument("layers", self.layers, Collection[Any], "`GroupPlan.from_list` reads JSON")
        for layer, groups in enumerate(self.layers):
            check_argument(f"layers[{layer}]", groups, Collection[Any], "give an entry for each group")
            for group, kind in enumerate(groups):
                if not isinstance(kind, SparseGroup | None):
                    raise ValueError(
                        f"`layers`: group {group} of layer {layer} is {kind!r}; give a `SparseGroup`, or None for a "
                        "dense one. `GroupPlan.from_list` reads JSON."
                    )
        # Lists are taken too, and plans that say the same are equal and have one hash.
        object.__setattr__(self, "layers", tuple(map(tuple, self.layers)))

    @classmethod
    @checked()
    def uniform(
        cls, num_layers: int, num_groups: int | Sequence[int], group: SparseGroup, dense_layers: Collection[int] = ()
    ) -> "GroupPlan":
        """
        A plan with the same sparse groups in all layers but those that stay dense.

        Args:
            num_layers: of the model, its dense ones included.
            num_groups: of every layer, or of each.
            group: what each group of a sparse layer is.
            dense_layers: counted from 0; they have as many groups, all dense.

        Raises:
            ValueError: for numbers below 1, and for layers that there are not.
        """
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, got {num_layers}.")
        sizes = [num_groups] * num_layers if isinstance(num_groups, int) else num_groups
        check_argument("num_groups", sizes, list[int], "pass a number, or one for each of `num_layers` layers")
        if len(sizes) != num_layers or min(sizes) < 1:
            raise ValueError(f"`num_groups` must be at least 1 in each of {num_layers} layers, got {num_groups}.")
        if outside := set(dense_layers) - set(range(num_layers)):
            raise ValueError(f"`dense_layers` names {sorted(outside)}, but there are layers 0 to {num_layers - 1}.")
        return cls(tuple(((None if i in dense_layers else group),) * size for i, size in enumerate(sizes)))

    @classmethod
    def of_config(cls, config: Any) -> "GroupPlan":
        """
        The plan of a model with sparse groups, or of the language model in it.

        Raises:
            ValueError: if the config's is of another number of layers, and for what is no config with sparse groups.
        """
        decoder = getattr(config, "get_text_config", None)
        if decoder is None or not hasattr(config := decoder(decoder=True), "layer_groups"):
            raise ValueError(
                f"`config` is a {type(config).__name__}, which names no sparse groups: pass `model.config` of a "
                "converted model."
            )
        if config.mosa_plan is not None and len(config.mosa_plan) != config.num_hidden_layers:
            raise ValueError(
                f"`mosa_plan` names the groups of {len(config.mosa_plan)} layers, but `num_hidden_layers` is "
                f"{config.num_hidden_layers}. Where layers were taken out of a model or added to it, "
                "`model.base_model.update_config()` writes the plan of those that it has."
            )
        return cls(config.layer_groups())

    @classmethod
    @checked()
    def load(cls, path: str | os.PathLike) -> "GroupPlan":
        """
        Reads a JSON file, `{"layers": [...]}`, see `from_list`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, and the layer and group that cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or set(content) != {"layers"}:
                raise ValueError('a plan is a JSON object with one entry, "layers".')
            return cls.from_list(content["layers"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @checked()
    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON file that `load` reads, a line for each layer; it replaces another one at once."""
        lines = ",\n".join("    " + json.dumps(groups) for groups in self.to_list())
        with atomic_file(Path(path)) as unfinished:
            unfinished.write_text(f'{{\n  "layers": [\n{lines}\n  ]\n}}\n', encoding="utf-8")

    @classmethod
    def from_list(cls, layers: list[Any]) -> "GroupPlan":
        """
        Reads JSON: a list of layers, each a list of `null` or `{"window": ..., "sparsity": ...}`.

        Raises:
            ValueError: naming the layer and group that cannot be read.
        """
        if not isinstance(layers, list) or not all(isinstance(groups, list) for groups in layers):
            raise ValueError("A plan must be a list of layers, each a list of groups (null, or window and sparsity).")
        return cls(
            tuple(
                tuple(_group(entry, layer_idx, group) for group, entry in enumerate(groups))
                for layer_idx, groups in enumerate(layers)
            )
        )

    def to_list(self) -> list[list[dict[str, int | float] | None]]:
        """What JSON has of it, see `from_list`."""
        return [
            [None if group is None else {"window": group.window, "sparsity": group.sparsity} for group in groups]
            for groups in self.layers
        ]

    @checked()
    def validate(self, num_groups: Collection[int], why_dense: Collection[str | None]) -> None:
        """
        Args:
            num_groups: of each layer of the model.
            why_dense: of each layer, what keeps it from having sparse groups; None: nothing does.

        Raises:
            ValueError: for a plan that does not fit the model, naming layer and group.
        """
        if len(self.layers) != len(num_groups):
            raise ValueError(
                f"The plan has {len(self.layers)} layers, but the model has {len(num_groups)}: give `plan` (in a "
                "config `mosa_plan`) a list for each."
            )
        if len(why_dense) != len(num_groups):
            raise ValueError(f"`why_dense` has {len(why_dense)} entries, but the model has {len(num_groups)} layers.")
        for layer_idx, (groups, size, reason) in enumerate(zip(self.layers, num_groups, why_dense, strict=True)):
            if len(groups) != size:
                raise ValueError(
                    f"The plan names {len(groups)} groups in layer {layer_idx}, but the model has {size}: give `plan` "
                    "(in a config `mosa_plan`) an entry for each."
                )
            if reason is not None and any(groups):
                raise ValueError(
                    f"The plan makes groups of layer {layer_idx} sparse, but {reason}: leave its groups null."
                )

    def sparse(self) -> dict[tuple[int, int], SparseGroup]:
        """Every sparse group, by `(layer, group)`."""
        return {(layer, i): each for layer, groups in enumerate(self.layers) for i, each in enumerate(groups) if each}

    def sparse_pairs(self) -> list[tuple[int, int]]:
        """The `(layer, group)` of every sparse group."""
        return list(self.sparse())

    @checked()
    def with_sparse(self, sparse: Mapping[tuple[int, int], SparseGroup]) -> "GroupPlan":
        """
        A plan of as many layers and groups: those of `sparse`, by `(layer, group)`, and all others dense.

        Raises:
            ValueError: for groups that there are not.
        """
        known = {(layer, group) for layer, groups in enumerate(self.layers) for group in range(len(groups))}
        if unknown := sparse.keys() - known:
            raise ValueError(f"`sparse` names {sorted(unknown)}, which are no (layer, group) of the plan.")
        return GroupPlan(
            tuple(
                tuple(sparse.get((layer, group)) for group in range(len(groups)))
                for layer, groups in enumerate(self.layers)
            )
        )

    def __str__(self) -> str:
        """A table: for each layer and group "window/sparsity", or "dense"."""
        names = [["dense" if x is None else f"{x.window}/{x.sparsity:g}" for x in groups] for groups in self.layers]
        rows = [["layer", *(f"group {i}" for i in range(max(map(len, names), default=0)))]]
        rows += [[str(layer), *row] for layer, row in enumerate(names)]
        width = max(len(cell) for row in rows for cell in row)
        table = "\n".join("  ".join(cell.rjust(width) for cell in row) for row in rows)
        num_groups = sum(map(len, self.layers))
        return f"{table}\n{len(self.sparse_pairs())} of {num_groups} groups sparse (window/sparsity)"

    @checked()
    def plot(self, path: str | os.PathLike, num_tokens: int = 4096) -> None:
        """
        Write a heat map (PNG): what each group's cache keeps of `num_tokens` tokens, layers down, groups across.

        Raises:
            ImportError: without matplotlib.
            ValueError: for a plan without groups, and for no tokens.
        """
        check_can_plot()
        from matplotlib.figure import Figure

        if not any(self.layers):
            raise ValueError("The plan names no groups: there is nothing to draw.")
        num_groups = max(map(len, self.layers))
        shares = [[1.0 if x is None else x.kept_share(num_tokens) for x in groups] for groups in self.layers]
        shares = [own + [math.nan] * (num_groups - len(own)) for own in shares]  # what a layer lacks stays white
        figure = Figure(figsize=(2.5 + 0.6 * num_groups, 1.2 + 0.25 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for layer, groups in enumerate(self.layers):
            for i, group in enumerate(groups):
                if group is not None:
                    color = "black" if shares[layer][i] > 0.6 else "white"
                    name = f"{group.window}/{group.sparsity:g}"
                    axes.text(i, layer, name, ha="center", va="center", color=color, fontsize=6)
        axes.set(xlabel="group", ylabel="layer", title="window/sparsity", xticks=range(num_groups))
        figure.colorbar(image, label=f"kept of {num_tokens:,} tokens")
        with atomic_file(Path(path)) as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)


def check_can_plot() -> None:
    """
    Raises:
        ImportError: without matplotlib, for who would rather know before long work than after it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("A plan's picture needs matplotlib: `pip install 'mosa-hf[plot]'`.")


def _group(entry: Any, layer_idx: int, group: int) -> SparseGroup | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or set(entry) != {"window", "sparsity"}:
        raise ValueError(
            f"Layer {layer_idx}, group {group} of the plan must be null or have `window` and `sparsity`, "
            f"got {entry!r}."
        )
    try:
        return SparseGroup(**entry)
    except ValueError as error:
        raise ValueError(f"Layer {layer_idx}, group {group} of the plan: {error}") from error
