"""Holds the code of functions that turn queries and keys that is known, and says how each of them turns.

They are given queries, keys or both, (B, heads, T, D) or (B, T, heads, D), and angles (B or 1, T, R); those of vision
towers (T, heads, D) and (T, R).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from trl_fast.ops.layers import Pairs

from .code_meaning import does


@dataclass(frozen=True)
class KnownRotary:
    """Describes a function that turns queries and keys.

    - `source`: its code; it stands by its own name in its module of transformers, and so does what it calls.
    - `helper`: the code of what it calls for each tensor.
    - `pairs`, `one_angle_a_pair`: as ops.layers.rotary has them.
    - `half_of_angles`: whether it reads the first half of the angles alone.
    - `upcast`: whether it computes in float32 and rounds once; None: where angles are in float32.
    - `one_tensor`: whether it is given one tensor, not two.
    - `without_batch`: whether what it is given has no dimension of rows.
    """

    source: str
    helper: str
    pairs: Pairs = "halves"
    one_angle_a_pair: bool = False
    half_of_angles: bool = False
    upcast: bool | None = False
    one_tensor: bool = False
    without_batch: bool = False

    @property
    def name(self) -> str:
        """Returns the function's name."""
        return _name(self.source)

    @property
    def functions(self) -> dict[str, str]:
        """Returns the code of the function and of what it calls, by their names."""
        return {_name(source): source for source in (self.source, self.helper) if source}


def known_rotaries(modeling: ModuleType) -> Iterator[KnownRotary]:
    """Yields the functions of a module of transformers that turn queries and keys in a way that is known."""
    for known in KNOWN_ROTARIES:
        if all(does(getattr(modeling, name, None), source) for name, source in known.functions.items()):
            yield known


def _name(source: str) -> str:
    return source.partition("def ")[2].partition("(")[0]


_HALVES = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
_ADJACENT = """
def rotate_half(x):
    x1 = x[..., 0::2]
    x2 = x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)
"""
_COHERES_ADJACENT = """
def rotate_half(x):
    x1 = x[..., ::2]
    x2 = x[..., 1::2]
    out = torch.stack([-x2, x1], dim=-1).flatten(-2)
    return out
"""
_GPT_OSS_HALVES = """
def _apply_rotary_emb(x, cos, sin):
    a, b = torch.chunk(x, 2, dim=-1)
    first = a * cos - b * sin
    second = b * cos + a * sin
    return torch.cat((first, second), dim=-1)
"""
_LLAMA = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_out = (q * cos) + (rotate_half(q) * sin)
    k_out = (k * cos) + (rotate_half(k) * sin)
    return q_out, k_out
"""
_OLMO = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    q_type, k_type = q.dtype, k.dtype
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_out = (q * cos) + (rotate_half(q) * sin)
    k_out = (k * cos) + (rotate_half(k) * sin)
    return q_out.to(q_type), k_out.to(k_type)
"""
_COHERE = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    dtype = q.dtype
    q = q.float()
    k = k.float()
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_out = (q * cos) + (rotate_half(q) * sin)
    k_out = (k * cos) + (rotate_half(k) * sin)
    return q_out.to(dtype=dtype), k_out.to(dtype=dtype)
"""
_MODERN_BERT = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    dtype = q.dtype
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_out = (q.float() * cos) + (rotate_half(q.float()) * sin)
    k_out = (k.float() * cos) + (rotate_half(k.float()) * sin)
    return q_out.to(dtype), k_out.to(dtype)
"""
_GEMMA_4 = """
def apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return (x * cos) + (rotate_half(x) * sin)
"""
_GPT_OSS = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_out = _apply_rotary_emb(q, cos, sin)
    k_out = _apply_rotary_emb(k, cos, sin)
    return q_out, k_out
"""
_FIRST_HALF = """
    cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
    sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)"""
_ERNIE = (
    """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    dtype = q.dtype
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)"""
    + _FIRST_HALF
    + """
    q_out = (q.float() * cos) + (rotate_half(q).float() * sin)
    k_out = (k.float() * cos) + (rotate_half(k).float() * sin)
    return q_out.to(dtype), k_out.to(dtype)
"""
)
# The first numbers of a head alone: GPT-NeoX, GLM-4.5, Qwen3-Next.
_PARTLY_HEAD = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)"""
_SPLIT = """
    width = cos.shape[-1]
    q_rot, q_pass = q[..., :width], q[..., width:]
    k_rot, k_pass = k[..., :width], k[..., width:]"""
_PARTLY = (
    _SPLIT
    + """
    q_out = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_out = (k_rot * cos) + (rotate_half(k_rot) * sin)
    q_out = torch.cat([q_out, q_pass], dim=-1)
    k_out = torch.cat([k_out, k_pass], dim=-1)
    return q_out, k_out
"""
)
_PHI_3 = (
    _PARTLY_HEAD
    + _SPLIT
    + """
    q_out = torch.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass], dim=-1)
    k_out = torch.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass], dim=-1)
    return q_out, k_out
"""
)
_NEMOTRON = (
    _PARTLY_HEAD
    + """
    width = cos.shape[-1]
    q, q_pass = q[..., :width], q[..., width:]
    k, k_pass = k[..., :width], k[..., width:]
    q_out = (q * cos) + (rotate_half(q) * sin)
    k_out = (k * cos) + (rotate_half(k) * sin)
    return torch.cat((q_out, q_pass), dim=-1), torch.cat((k_out, k_pass), dim=-1)
"""
)
_DEEPSEEK = """
def apply_rotary_pos_emb_interleave(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    cos = cos[..., : cos.shape[-1] // 2].unsqueeze(unsqueeze_dim)
    sin = sin[..., : sin.shape[-1] // 2].unsqueeze(unsqueeze_dim)
    q1, q2 = q[..., 0::2], q[..., 1::2]
    k1, k2 = k[..., 0::2], k[..., 1::2]
    q_out = torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], dim=-1)
    k_out = torch.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin], dim=-1)
    return q_out, k_out
"""
_VISION = """
def apply_rotary_pos_emb_vision(q, k, cos, sin):
    q_dtype = q.dtype
    k_dtype = k.dtype
    q, k = q.float(), k.float()
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    q_out = (q * cos) + (rotate_half(q) * sin)
    k_out = (k * cos) + (rotate_half(k) * sin)
    q_out = q_out.to(q_dtype)
    k_out = k_out.to(k_dtype)
    return q_out, k_out
"""
_GLM = _PARTLY_HEAD + _FIRST_HALF + _PARTLY
# GLM-4V and GLM-OCR: what is called has another name.
_GLM_4V, _GLM_4V_ADJACENT = (
    source.replace("rotate_half", "rotate_half_llm") for source in (_PARTLY_HEAD + _PARTLY, _ADJACENT)
)

KNOWN_ROTARIES = (
    KnownRotary(_LLAMA, _HALVES),
    KnownRotary(_PARTLY_HEAD + _PARTLY, _HALVES),
    KnownRotary(_PHI_3, _HALVES),
    KnownRotary(_NEMOTRON, _HALVES),
    KnownRotary(_OLMO, _HALVES, upcast=None),
    KnownRotary(_MODERN_BERT, _HALVES, upcast=True),
    KnownRotary(_GEMMA_4, _HALVES, one_tensor=True),
    KnownRotary(_GPT_OSS, _GPT_OSS_HALVES, one_angle_a_pair=True),
    KnownRotary(_VISION, _HALVES, upcast=True, without_batch=True),
    KnownRotary(_LLAMA, _COHERES_ADJACENT, pairs="adjacent"),
    KnownRotary(_COHERE, _COHERES_ADJACENT, pairs="adjacent", upcast=True),
    KnownRotary(_GLM_4V, _GLM_4V_ADJACENT, pairs="adjacent"),
    KnownRotary(_GLM, _ADJACENT, pairs="adjacent", one_angle_a_pair=True, half_of_angles=True),
    KnownRotary(_ERNIE, _ADJACENT, pairs="adjacent", one_angle_a_pair=True, half_of_angles=True, upcast=True),
    KnownRotary(_DEEPSEEK, "", pairs="adjacent_to_halves", one_angle_a_pair=True, half_of_angles=True),
)
