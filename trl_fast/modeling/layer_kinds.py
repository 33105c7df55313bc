"""Tells by what each layer of a model mixes the tokens of a sequence: attention, a recurrence, a convolution.

This is the one place that knows families apart. What chooses a layout, plans a step or generates reads it. It is read
from the config, which says what the masks are, and from the modules, which say what computes. A family is known when
its modules are: attention by its class's name and `layer_types`, recurrent layers by `RECURRENT_MIXERS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trl_fast.parallel.engines import original_class

ATTENTION, UNKNOWN = "attention", "unknown"
GATED_DELTA_NET, DELTA_ATTENTION = "Gated DeltaNet", "Kimi Delta Attention"
SHORT_CONVOLUTION, LIGHTNING_ATTENTION = "short convolution", "lightning attention"
MAMBA_1, MAMBA_2 = "Mamba 1", "Mamba 2"
OTHER_RECURRENCE = "recurrence"

# How the class of a layer's recurrent module ends, in transformers. A longer ending goes before a shorter one.
RECURRENT_MIXERS = {
    "GatedDeltaNet": GATED_DELTA_NET,  # Qwen3-Next, Qwen3.5, OLMo-Hybrid
    "DeltaAttention": DELTA_ATTENTION,  # Kimi-Linear, Bailing
    "ShortConv": SHORT_CONVOLUTION,  # LFM2, LFM3
    "LightningAttention": LIGHTNING_ATTENTION,  # MiniMax
    "Zamba2MambaMixer": MAMBA_2,
    "Mamba2Mixer": MAMBA_2,  # Mamba 2, Nemotron-H
    "HybridMambaLayer": MAMBA_2,  # Granite 4
    "BambaMixer": MAMBA_2,
    "FalconH1Mixer": MAMBA_2,
    "MambaMixer": MAMBA_1,  # Mamba, Falcon-Mamba, Jamba, Zamba
    "RecurrentBlock": OTHER_RECURRENCE,  # RecurrentGemma
    "RwkvSelfAttention": OTHER_RECURRENCE,
    "xLSTMLayer": OTHER_RECURRENCE,
    "mLSTMLayer": OTHER_RECURRENCE,
}
_ATTENTION_ENDINGS = ("Attention", "MLA")
# The entries of `layer_types` whose attention is known: a layer sees all tokens before, a window, or a chunk of them.
_WINDOWED = ("sliding_attention", "hybrid_sliding")
_CHUNKED = "chunked_attention"
_KNOWN_TYPES = ("full_attention", "attention", "hybrid", *_WINDOWED, _CHUNKED)
# The attribute of configs and attention modules that holds a window's length.
_WINDOW = "sliding_window"
# What Llama 4's layers without rotary positions do: transformers counts from the row's first token, whatever the
# position ids say. Rows shorter than 8192 tokens do not show it.
_SCALED_BY_PLACE = "attention whose queries are scaled by their place in the row (attn_temperature_tuning)"
# Those of layers that mix no tokens.
_WITHOUT_MIXER = ("moe", "mlp")


class LayerKind(NamedTuple):
    """Describes one module of a layer that mixes tokens; a layer may have two side by side.

    - `layer`: the layer's number.
    - `mixer`: ATTENTION, a value of RECURRENT_MIXERS, or UNKNOWN.
    - `name`: what it is called in messages: the entry of `layer_types`, or the module's class.
    - `window`: how many tokens a token sees, itself included; None: all before it.
    - `chunk`: tokens of a chunk, where a token sees only those of its own chunk.
    - `sinks`: whether a number for each head takes part in the softmax.
    - `softcap`: the largest score, None where scores are not capped.
    - `shares_keys`: whether keys and values are those of an earlier layer.
    - `heads`, `key_heads`: of queries, and of keys and values; `key_width`, `value_width`: channels of each head.
    - `convolution`: how many tokens a recurrent layer's convolution reads, the token itself included.

    The last five are 0 where they say nothing of the mixer.
    """

    layer: int
    mixer: str
    name: str
    window: int | None = None
    chunk: int | None = None
    sinks: bool = False
    softcap: float | None = None
    shares_keys: bool = False
    heads: int = 0
    key_heads: int = 0
    key_width: int = 0
    value_width: int = 0
    convolution: int = 0

    @property
    def is_recurrent(self) -> bool:
        """Returns whether a state runs on from token to token."""
        return self.mixer not in (ATTENTION, UNKNOWN)


def layer_kinds(model: PreTrainedModel) -> tuple[LayerKind, ...]:
    """Returns the modules of a model that mix tokens, layer by layer. Nothing is run; weights may be on meta.

    A layer whose mixer is not known has the mixer UNKNOWN, and so has a model whose layers are not found.
    """
    config = model.config.get_text_config()
    layers = decoder_layers(model)
    if layers is None:
        return (LayerKind(0, UNKNOWN, type(model).__name__),)
    types = list(getattr(config, "layer_types", None) or [None] * len(layers))
    found: list[LayerKind] = []
    for number, layer in enumerate(layers):
        kind = types[number] if number < len(types) else None
        mixers = [_kind_of(module, number, kind, config) for module in _mixers(layer)]
        if not mixers and kind not in _WITHOUT_MIXER:
            mixers = [LayerKind(number, UNKNOWN, kind or type(layer).__name__)]
        found += mixers
    return tuple(found)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Returns the layers of a model's text decoder, in order; None if no list of its modules is that long."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in (*model.get_decoder().modules(), *model.modules()):
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    return None


def mixers_of(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yields the modules of a model's layers that mix tokens, in order."""
    for layer in decoder_layers(model) or ():
        yield from _mixers(layer)


def recurrent_mixer(module: nn.Module) -> str | None:
    """Returns which value of RECURRENT_MIXERS a module is, None if it is none of them."""
    name = original_class(module).__name__
    return next((mixer for ending, mixer in RECURRENT_MIXERS.items() if name.endswith(ending)), None)


@contextmanager
def shortened_windows(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Gives a model windows of at most so many tokens within the context, so that short sequences cross them."""
    holders: list[Any] = [model.config.get_text_config(), *model.modules()]
    longer = [(holder, vars(holder).get(_WINDOW)) for holder in holders]
    longer = [(holder, window) for holder, window in longer if isinstance(window, int) and window > tokens]
    for holder, _ in longer:
        setattr(holder, _WINDOW, tokens)
    try:
        yield
    finally:
        for holder, window in longer:
            setattr(holder, _WINDOW, window)


def _mixers(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the outermost modules in a layer that mix tokens; a convolution outside of them is one of its own."""
    for child in module.children():
        is_attention = original_class(child).__name__.endswith(_ATTENTION_ENDINGS)
        if is_attention or recurrent_mixer(child) or isinstance(child, nn.Conv1d):
            yield child
        else:
            yield from _mixers(child)


def _kind_of(module: Any, layer: int, kind: str | None, config: PretrainedConfig) -> LayerKind:
    name, mixer, convolution = original_class(module).__name__, recurrent_mixer(module), _convolution(module)
    if mixer is not None:
        return LayerKind(layer, mixer, name, convolution=convolution)
    if convolution or (kind is not None and kind not in _KNOWN_TYPES):
        return LayerKind(layer, UNKNOWN, kind or name, convolution=convolution)
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        return LayerKind(layer, UNKNOWN, _SCALED_BY_PLACE)
    width = _number(module, "qk_head_dim") or _number(module, "head_dim") or _number(config, "head_dim")
    heads = _number(module, "num_heads") or _number(config, "num_attention_heads")
    groups = _number(module, "num_key_value_groups")
    return LayerKind(
        layer,
        ATTENTION,
        kind or name,
        window=_window(module, kind, config),
        chunk=getattr(config, "attention_chunk_size", None) if kind == _CHUNKED else None,
        sinks=isinstance(getattr(module, "sinks", None), nn.Parameter),
        softcap=getattr(config, "attn_logit_softcapping", None),
        shares_keys=bool(getattr(module, "is_kv_shared_layer", False)),
        heads=heads,
        key_heads=heads // groups if groups else _number(config, "num_key_value_heads") or heads,
        key_width=width,
        value_width=_number(module, "v_head_dim") or width,
    )


def _window(module: Any, kind: str | None, config: PretrainedConfig) -> int | None:
    """Returns the window of an attention module: by its layer's type, else the one that the config has for all."""
    if kind is not None and kind not in _WINDOWED:
        return None
    window = getattr(module, _WINDOW, None) or getattr(config, _WINDOW, None)
    is_used = kind is not None or getattr(config, "use_sliding_window", True)
    return window if window and is_used else None


def _convolution(module: nn.Module) -> int:
    """Returns how many tokens the widest convolution in a module reads, 0 if there is none."""
    return max((each.kernel_size[0] for each in module.modules() if isinstance(each, nn.Conv1d)), default=0)


def _number(holder: object, name: str) -> int:
    try:
        value = getattr(holder, name, None)
    except RuntimeError:
        # transformers' word for a number that differs from layer to layer.
        return 0
    return value if isinstance(value, int) else 0
