"""RMSNorms as transformers' families write them, x (..., H) and weight (H,), and shapes to try them on."""

import torch

EPS = 1e-5
NORM_SHAPES = [(3, 7, 20), (130, 9), (1, 64), (0, 16), (2, 0, 16), (5, 1), (33,)]


def llama(x, weight):
    """Rounds before the product with the weight."""
    upcast = x.to(torch.float32)
    upcast = upcast * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * upcast.to(x.dtype)


def gemma(x, weight):
    """Rounds after the product with 1 + weight."""
    upcast = x.float()
    upcast = upcast * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + EPS)
    return (upcast * (1.0 + weight.float())).type_as(x)


def olmo(x, weight):
    """Rounds after the product with the weight."""
    upcast = x.to(torch.float32)
    upcast = upcast * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * upcast).to(x.dtype)


def exact_norm(cast):
    """Returns the norm of a family without roundings, in the dtype of its arguments."""

    def norm(x, weight):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return normed * (1 + weight) if cast == "gemma" else normed * weight

    return norm


PLAIN_NORMS = {"llama": llama, "gemma": gemma, "olmo": olmo}
