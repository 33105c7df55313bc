"""Loss and every gradient of a model on token trees in a layout, held against those in another one."""

from __future__ import annotations

import torch

from trl_fast.data import Tree, pack_trees
from trl_fast.data.images.layout import ImageLayout
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import score

LossAndGradients = tuple[torch.Tensor, dict[str, torch.Tensor]]


def loss_and_gradients(
    model: torch.nn.Module,
    trees: list[Tree],
    layout: str,
    *,
    router: bool = True,
    image_layout: ImageLayout | None = None,
) -> LossAndGradients:
    """A loss of log-probs, entropies and the routers, and the gradient of every parameter that trains and is read."""
    batch = pack_trees(trees, layout, 2, image_layout=image_layout)
    router = router and hasattr(base_model(model).config.get_text_config(), "router_aux_loss_coef")
    scores = score(model, batch, outputs=("logprobs", "entropy"), output_router_logits=router)
    tokens = scores.tokens
    sums = torch.zeros(len(batch)).index_add(0, batch.branch, tokens.logprobs)
    loss = -torch.nn.functional.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).sum() + 0.1 * tokens.entropy.sum()
    if router:
        loss = loss + scores.aux_loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: LossAndGradients, expected: LossAndGradients) -> None:
    """The same loss, and each gradient within 2e-5 of its norm, or of a thousandth of the norm of all together."""
    (loss, gradients), (expected_loss, expected_gradients) = got, expected
    torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=2e-6)
    assert gradients.keys() == expected_gradients.keys()
    total = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        # Some biases have no gradient in truth: what is there is rounding.
        scale = max(gradient.norm(), 1e-3 * total)
        assert (gradients[name] - gradient).norm() < 2e-5 * scale, name


def assert_as_near(got: LossAndGradients, padded: LossAndGradients, exact: LossAndGradients) -> None:
    """The loss of float64, and each gradient within 2e-5 of it as above, or twice as far as that of padded rows."""
    (loss, gradients), (_, of_padded), (exact_loss, exact_gradients) = got, padded, exact
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    assert gradients.keys() == exact_gradients.keys()
    total = torch.stack([gradient.norm() for gradient in exact_gradients.values()]).norm()
    for name, gradient in exact_gradients.items():
        allowed = 2e-5 * max(gradient.norm(), 1e-3 * total)
        assert (gradients[name] - gradient).norm() < max(allowed, 2 * (of_padded[name] - gradient).norm()), name
