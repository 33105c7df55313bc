"""The layers of transformers that are known are counted from their code."""

from __future__ import annotations

import pytest

from benchmarks import known_layers
from benchmarks.known_layers import Place
from support.source_tree import ROOT

BODY = """
class LlamaRMSNorm(nn.Module):
    def forward(self, hidden):
        kind = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden.to(kind)


class OtherRMSNorm(nn.Module):
    def forward(self, hidden):
        return 2 * hidden


class PlainMLP(nn.Module):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SomeDecoderLayer(nn.Module):
    def forward(self, x):
        y = self.attention(x)
        x = residual + y
        residual = x
        x = self.norm(x)
        return x


class SomeAttention(nn.Module):
    def __init__(self):
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 8)
        self.o_proj = nn.Linear(8, 8)

    def forward(self, x, cos, sin):
        q = self.q_norm(self.q_proj(x).view(x.shape[:-1], -1, 8)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(x.shape[:-1], -1, 8)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k


class OtherAttention(nn.Module):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_pos_emb(self.q_proj(x), self.k_proj(x), cos, sin)
        return self.q_norm(q), self.k_norm(k)


class PlainAttention(nn.Module):
    def __init__(self):
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 8)
        self.o_proj = nn.Linear(8, 8)

    @decorated
    def forward(self, x, cos, sin):
        return apply_rotary_pos_emb(self.q_proj(x), self.k_proj(x), cos, sin)


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return (x * cos) + (rotate_half(x) * sin)


def apply_rotary_pos_emb_vision(x, cos, sin):
    return x
"""


def test_places_of_a_family(tmp_path, monkeypatch):
    (tmp_path / "models" / "some").mkdir(parents=True)
    (tmp_path / "models" / "some" / "modeling_some.py").write_text(BODY)
    monkeypatch.setattr(known_layers.transformers, "__file__", str(tmp_path / "__init__.py"))
    expected = [
        ("norm", "LlamaRMSNorm", True),
        ("norm", "OtherRMSNorm", False),
        ("gated MLP", "GatedMLP", True),
        ("decoder layer", "SomeDecoderLayer", True),
        ("projecting attention", "SomeAttention", True),
        ("normalising attention", "SomeAttention", True),
        ("normalising attention", "OtherAttention", False),
        ("projecting attention", "PlainAttention", False),
        ("rotary function", "apply_rotary_pos_emb", True),
        ("rotary function", "apply_rotary_pos_emb_vision", False),
    ]
    assert list(known_layers.places()) == [Place(kind, "some", name, known) for kind, name, known in expected]


@pytest.mark.slow
def test_the_table_of_the_page():
    assert known_layers.table() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
