"""How far what a model predicts is from what the original does."""

import torch
import torch.nn.functional as F

CHUNK = {"cpu": 16}  # tokens whose distributions are in float32 at once: what caches hold; elsewhere 256


def divergence_of_likely(logits: torch.Tensor, token: torch.Tensor, log_probability: torch.Tensor) -> torch.Tensor:
    """
    KL(expected ‖ predicted) in nats, summed over N tokens, of the expected distributions' most likely next tokens; all
    others count as one.

    Args:
        logits: `[N, V]`, of what is predicted.
        token, log_probability: `[N, K]`, of what is expected.
    """
    actual = logits.float().log_softmax(-1).gather(-1, token)
    actual, expected = (_with_rest(each) for each in (actual, log_probability))
    return F.kl_div(actual, expected, reduction="sum", log_target=True)


def _with_rest(log_probability: torch.Tensor) -> torch.Tensor:
    """`[N, K]` → `[N, K + 1]`, the last for all other tokens together."""
    rest = torch.log1p(-log_probability.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat((log_probability, rest), dim=-1)


def mean_divergence(actual: torch.Tensor, expected: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """
    KL(expected ‖ actual) in nats, averaged over N tokens; float32 copies are made of a few tokens at a time. It is
    differentiated once: with `create_graph=True` it is refused.

    Args:
        actual, expected: logits `[N, V]`; the gradient is that of `actual`.
        top_k: compare the `top_k` most likely tokens of what is expected, and all others as one; None: every token.
    """
    return _MeanDivergence.apply(actual, expected, top_k)


class _MeanDivergence(torch.autograd.Function):
    """Makes the gradient with the loss, while the few tokens at hand are near: nothing is computed again."""

    @staticmethod
    def forward(ctx, actual: torch.Tensor, expected: torch.Tensor, top_k: int | None) -> torch.Tensor:
        chunk = CHUNK.get(actual.device.type, 256)
        total = actual.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(actual) if ctx.needs_input_grad[0] else None
        for start in range(0, len(actual), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(gradient is not None):
                ours = actual[part].detach().requires_grad_(gradient is not None)
                divergence = _divergence(ours, expected[part].detach(), top_k)
            total += divergence.detach()
            if gradient is not None:  # of the sum: of the mean, it could be too small for float16
                (gradient[part],) = torch.autograd.grad(divergence, ours)
        ctx.save_for_backward(gradient)
        return total / len(actual)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if torch.is_grad_enabled():  # the gradient that is made with the loss is a constant
            raise RuntimeError(
                "`mean_divergence` has no gradient of its gradient (`create_graph=True`): compute the divergence with "
                "`torch.nn.functional.kl_div` of `log_softmax`."
            )
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / len(gradient)), None, None


def _divergence(actual: torch.Tensor, expected: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Summed over the tokens; see `mean_divergence`."""
    expected = expected.float().log_softmax(-1)
    if top_k is not None and top_k < expected.shape[-1]:
        log_probability, token = expected.topk(top_k, dim=-1)
        return divergence_of_likely(actual, token, log_probability)
    return F.kl_div(actual.float().log_softmax(-1), expected, reduction="sum", log_target=True)
