"""Gradients of gradients, `torch.func` and forward-mode differentiation: as of stock models, or refused by name."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from transformers import LlamaForCausalLM

from mosa_hf import use_backend
from mosa_hf.conversion.divergence import mean_divergence
from mosa_hf.kernels.gather_project.pytorch import gather_project
from mosa_hf.kernels.project_scatter.pytorch import project_scatter
from mosa_hf.kernels.sparse_attention.pytorch import opaque_sparse_attention
from testing.tiny import tiny_base

from ..conftest import native_form, sparse_form

TOKENS = torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(0))
GROUP = {"window": 3, "sparsity": 3}
ONE_LAYER = {"num_hidden_layers": 1}
STILL = {**ONE_LAYER, "mosa_threshold_momentum": 1.0}  # thresholds that do not follow
MODELS = {
    "stock": lambda: tiny_base(**ONE_LAYER),
    "sparse": lambda: sparse_form(mosa_plan=[[None, GROUP, GROUP]], **STILL).model(),
    "native": lambda: native_form(**STILL).model(),
}


@pytest.fixture(params=MODELS)
def model(request):
    """With dense heads that can be differentiated twice."""
    model = MODELS[request.param]()
    model.set_attn_implementation("eager")
    return model


def of_embeddings(model):
    """The last logits of three tokens as a function of the embeddings `[1, T, D]`, and those."""
    states = model.model.embed_tokens(TOKENS[:1]).detach()
    return (lambda x: model(inputs_embeds=x, use_cache=False).logits[0, -1, :3]), states


def direction(states):
    return torch.randn(states.shape, generator=torch.Generator().manual_seed(1))


def in_float64(model):
    model = model.double()
    function, states = of_embeddings(model)
    return function, states.double()


def forward_mode(function, states):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(states, direction(states).to(states)))).tangent


WAYS = {
    "jvp": lambda function, states: jvp(function, (states,), (direction(states).to(states),))[1],
    "forward mode": forward_mode,
    "jacrev": lambda function, states: (jacrev(function)(states) * direction(states).to(states)).flatten(1).sum(1),
    "vectorised": lambda function, states: (
        (torch.autograd.functional.jacobian(function, states, vectorize=True) * direction(states).to(states))
        .flatten(1)
        .sum(1)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_first_derivatives(model, way):
    """By every way what autograd gives, one logit at a time."""
    function, states = in_float64(model)
    logits = function(states.requires_grad_(True))
    expected = [(torch.autograd.grad(each, states, retain_graph=True)[0] * direction(states)).sum() for each in logits]
    actual = WAYS[way](function, states.detach())
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_inputs_at_once(model):
    function, states = of_embeddings(model)
    several = torch.stack((states, states + 0.1 * direction(states)))
    torch.testing.assert_close(vmap(function)(several), torch.stack([function(each) for each in several]))


def test_rows_at_once(model):
    """`vmap` over rows is a batch, and gradients by example are those of each alone."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(own, row):
        return functional_call(model, own, (row[None],), {"labels": row[None], "use_cache": False}).loss

    by_row = vmap(grad(loss), in_dims=(None, 0))(weights, TOKENS)
    for i, row in enumerate(TOKENS):
        model.zero_grad()
        model(row[None], labels=row[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(by_row[name][i], own, rtol=1e-3, atol=1e-5)


def gradient(function, states, create_graph: bool = False):
    """Of the sum of the logits."""
    states = states.detach().requires_grad_(True)
    return torch.autograd.grad(function(states).sum(), states, create_graph=create_graph)[0], states


def second_derivative(function, states):
    """Along a direction, by the gradient of a gradient."""
    first, states = gradient(function, states, create_graph=True)
    return (torch.autograd.grad((first * direction(states)).sum(), states)[0] * direction(states)).sum()


def test_second_derivatives(model):
    """Right within the reference, and by `torch.func` anywhere; fast forms refuse them, lest a part be left out."""
    function, states = in_float64(model)
    with use_backend("reference"):
        second = second_derivative(function, states)
    way = direction(states)
    changes = gradient(function, states + 1e-3 * way)[0] - gradient(function, states - 1e-3 * way)[0]
    torch.testing.assert_close((changes * way).sum() / 2e-3, second, rtol=1e-2, atol=1e-2)
    scaled = hessian(lambda scale: function(states + scale * way).sum())(states.new_zeros(()))
    torch.testing.assert_close(scaled, second, rtol=1e-4, atol=1e-4)
    if not isinstance(model, LlamaForCausalLM) or hasattr(model.config, "mosa_window"):
        with pytest.raises(RuntimeError, match=r'`with mosa_hf.use_backend\("reference"\):`'):
            second_derivative(function, states)


def test_second_derivatives_where_layers_are_computed_again(model):
    """Gradient checkpointing, in training."""
    model.train()
    function, states = in_float64(model)
    with use_backend("reference"):
        expected = second_derivative(function, states)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(second_derivative(function, states), expected)


def test_projections_are_differentiated_twice():
    """The fast projections' own gradients, by finite differences of those."""
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    token = torch.tensor([[0, 2, 2], [1, 3, 0]])  # of two groups
    angle = torch.randn(4, 2, dtype=torch.float64)
    states, router, router_bias = draw(4, 3), draw(2, 3), draw(2)
    weights, biases = [draw(2, 4, 3), draw(2, 2, 3), draw(2, 2, 3)], [draw(2, 4), draw(2, 2), draw(2, 2)]

    def project(states, router, router_bias, *others):
        gate = ((states.detach()[token] * router.detach()[:, None]).sum(-1) + router_bias.detach()[:, None]).sigmoid()
        cos, sin = angle.cos().repeat(1, 1), angle.sin().repeat(1, 1)
        outputs = gather_project(states, token, cos, sin, gate, *others[:3], router, *others[3:], router_bias)
        return outputs

    inputs = (states, router, router_bias, *weights, *biases)
    assert torch.autograd.gradcheck(project, inputs)
    assert torch.autograd.gradgradcheck(project, inputs)
    heads, gate, weight = draw(2, 3, 4), draw(2, 3), draw(2, 3, 4)
    assert torch.autograd.gradgradcheck(
        lambda *own: project_scatter(*own[:2], token, own[2], 4), (heads, gate, weight)
    )


def test_operations_of_compiled_graphs_refuse_second_derivatives():
    query, key = torch.randn(1, 1, 1, 4, 8, requires_grad=True), torch.randn(1, 1, 4, 8)
    position, selected = torch.arange(4)[None], torch.ones(1, 1, 4, dtype=torch.bool)
    output = opaque_sparse_attention(
        query, key, key, None, None, position, None, selected, None, position, None, 2, None, None
    )
    (first,) = torch.autograd.grad(output.pow(2).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r'`with mosa_hf.use_backend\("reference"\):`'):
        torch.autograd.grad(first.sum(), query)


def test_divergence_is_differentiated_once():
    """Its gradient is made with it: a second one would be that of a constant."""
    actual, expected = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="`mean_divergence` has no gradient of its gradient"):
        torch.autograd.grad(mean_divergence(actual, expected), actual, create_graph=True)
