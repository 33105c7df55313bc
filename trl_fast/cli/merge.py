"""Merges an adapter into its base model and saves the whole model: `trl-fast merge ADAPTER_FOLDER`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trl_fast.console import make_console
from trl_fast.input_errors import error_line
from trl_fast.settings.choices import one_of
from trl_fast.settings.packages import check_package

from .arguments import DTYPES, ModelConfig, get_quantization_config
from .positional import parse_with_name

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# How far log-probs may differ on average because the sum of weights and adapter was rounded once.
ROUNDING = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_PROBE = "The quick brown fox jumps over the lazy dog. 12 + 30 = 42. def f(x):\n    return x"
_PROBE_TOKENS = 64


@dataclass
class MergeArguments:
    """Says where the merged model goes."""

    output: str | None = None
    """Folder of the merged model. None: the adapter's name with -merged."""

    dtype: str = one_of(DTYPES, default="auto")
    """Number format of the weights: auto (as the base model is stored), bfloat16, float16 or float32."""

    base_model: str | None = None
    """Base model: a hub name or a folder. None: the one that the adapter names."""

    revision: str | None = None
    """Branch, tag or commit of a hub adapter. None: its main branch."""

    push_to_hub: str | None = None
    """Upload the model under this hub name, too. None: do not."""

    trust_remote_code: bool = False
    """Allow models and tokenizers that bring Python code of their own."""

    load_in_4bit: bool = False
    """Merge into the 4-bit weights that QLoRA trained on, dequantized, instead of those that the base's files hold."""

    load_in_8bit: bool = False
    """Merge into 8-bit weights, dequantized, as load_in_4bit."""

    bnb_4bit_quant_type: str = one_of(("fp4", "nf4"), default="nf4")
    """Format of 4-bit weights: fp4 or nf4."""

    use_bnb_nested_quant: bool = False
    """Whether the scales of 4-bit weights were quantised too (double quantisation)."""

    def quantization(self) -> BitsAndBytesConfig | None:
        """Returns how the base model is quantised before it is dequantised; None: not at all.

        Raises:
            ImportError: bitsandbytes is not installed.
            ValueError: both kinds are asked for.
        """
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        check_package("bitsandbytes", "bitsandbytes", f"load_in_{4 if self.load_in_4bit else 8}bit=True")
        return get_quantization_config(
            ModelConfig(
                load_in_4bit=self.load_in_4bit,
                load_in_8bit=self.load_in_8bit,
                bnb_4bit_quant_type=self.bnb_4bit_quant_type,
                use_bnb_nested_quant=self.use_bnb_nested_quant,
            )
        )


class Check(NamedTuple):
    """Holds how the merged model compares with the adapter on its base, on a probe.

    - `error`: mean absolute difference of log-probs (of a reward model: of rewards).
    - `effect`: the same between adapter and base model alone.
    """

    error: float
    effect: float

    @property
    def loses(self) -> bool:
        """Says whether rounding takes away much of what the adapter changed."""
        return self.error > max(self.effect / 3, ROUNDING["float32"])


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Loads adapter and base model; returns what merges, saves and gives the exit status."""
    adapter, parsed = parse_with_name(MergeArguments, arguments, "merge", "ADAPTER_FOLDER")
    from trl_fast.modeling.adapter_folder import load_with_adapter, processor_of, read_adapter
    from trl_fast.modeling.loading import base_model, reads_images

    output = output_folder(adapter, parsed.output)
    config = read_adapter(adapter, parsed.revision)
    if config.is_prompt_learning:
        raise ValueError(
            f"{adapter!r} is a {type(config).__name__}: its virtual tokens stand beside the weights and cannot be "
            "merged; use it as it is, with peft.AutoPeftModelForCausalLM"
        )
    model, tokenizer = load_with_adapter(
        adapter,
        base=parsed.base_model,
        dtype=parsed.dtype,
        revision=parsed.revision,
        trust_remote_code=parsed.trust_remote_code,
        quantization_config=parsed.quantization(),
    )
    processing: PreTrainedTokenizerBase | ProcessorMixin = tokenizer
    if reads_images(model.config):
        processing = processor_of(
            adapter, base_model(model).config._name_or_path, tokenizer, trust_remote_code=parsed.trust_remote_code
        )
    merged, check = merge(model, tokenizer, adapter)
    return lambda: _finish(merged, processing, check, adapter, output, parsed.push_to_hub)


def output_folder(adapter: str, output: str | None) -> Path:
    """Returns the folder that the merged model goes to.

    Raises:
        ValueError: there is something in it.
    """
    local = Path(adapter) if Path(adapter).name else Path(adapter).resolve()
    # Of a hub name the last part counts; a folder's stands beside the adapter.
    folder = local.with_name(f"{local.name}-merged") if local.is_dir() else Path(f"{local.name}-merged")
    folder = folder if output is None else Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={str(folder)!r} is there already, and nothing is overwritten; give another folder")
    return folder


def merge(model: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[PreTrainedModel, Check]:
    """Merges an adapter into its base model, and compares the two on a probe.

    Raises:
        ValueError: the adapter cannot be merged, or the merged model says something else than the adapter did.
    """
    import torch

    from trl_fast.modeling.adapter_folder import probe_scores

    input_ids = torch.tensor([probe_ids(tokenizer)])
    adapted = probe_scores(model, input_ids)
    with model.disable_adapter():
        base = probe_scores(model, input_ids)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ValueError(f"{name!r} cannot be merged: {error_line(error)}") from error
    after = probe_scores(merged, input_ids)
    check = Check(_difference(adapted, after), _difference(adapted, base))
    limit = ROUNDING.get(str(merged.dtype).removeprefix("torch."), ROUNDING["bfloat16"])
    if not check.error <= limit:
        raise ValueError(
            f"{name!r}: the merged model is not the adapter's: on {input_ids.shape[1]} tokens their scores differ by "
            f"{check.error:.3g} on average, more than rounding to {merged.dtype} explains ({limit:g}); merge with "
            "dtype=float32, or use the adapter as it is"
        )
    return merged, check


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids of a short text, on which models are compared."""
    ids = [token for token in tokenizer(_PROBE)["input_ids"] if token != tokenizer.pad_token_id]
    return ids[:_PROBE_TOKENS]


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the mean absolute difference of two vectors of the same shape (N,)."""
    return (first - second).abs().mean().item()


def save(
    model: PreTrainedModel, processing: PreTrainedTokenizerBase | ProcessorMixin, folder: Path, card: str
) -> None:
    """Saves model, tokenizer, generation config and card; the folder has its name only when all is in it.

    processing: the tokenizer, or the processor of a model that reads images, with its tokenizer.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merging-") as temporary:
        part = Path(temporary) / "model"
        model.save_pretrained(part)
        processing.save_pretrained(part)
        (part / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)


def merged_card(name: str, adapter: str, model: PreTrainedModel) -> str:
    """Returns the text of the merged model's README.md."""
    from trl_fast.modeling.loading import language_model_class, reads_images

    auto = "AutoModelForSequenceClassification"
    if model.can_generate():
        auto = language_model_class(model.config).__name__
    reader, variable = ("AutoProcessor", "processor") if reads_images(model.config) else ("AutoTokenizer", "tokenizer")
    origin = model.config._name_or_path
    lines = ["---", "library_name: transformers", f"model_name: {name}"]
    if not Path(origin).is_dir():
        lines.append(f"base_model: {origin}")
    lines += ["tags:", "- trl", "- trl_fast", "---", "", f"# {name}", ""]
    lines += [f"The adapter `{adapter}`, merged into `{origin}` by `trl-fast merge`. To load it:", "", "```python"]
    lines += [f"from transformers import {reader}, {auto}", ""]
    lines += [f'model = {auto}.from_pretrained("{name}", dtype="auto")']
    lines += [f'{variable} = {reader}.from_pretrained("{name}")', "```", ""]
    return "\n".join(lines)


def _finish(
    model: PreTrainedModel,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    check: Check,
    adapter: str,
    output: Path,
    hub_name: str | None,
) -> int:
    console = make_console(highlight=False)
    name = hub_name or output.name
    save(model, processing, output, merged_card(name, adapter, model))
    what = "log-probs" if model.can_generate() else "rewards"
    console.print(
        f"Checked on a short text: {what} of the merged model differ by {check.error:.2g} on average from the "
        f"adapter's (rounding to {str(model.dtype).removeprefix('torch.')}); the adapter changed them by "
        f"{check.effect:.2g}."
    )
    if check.effect == 0:
        console.print("The adapter changes nothing there: is it trained, and is this its base model?", style="yellow")
    if check.loses:
        console.print("Rounding loses much of that: merge with --dtype float32 to keep it.", style="yellow")
    size = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    console.print(f"Merged model saved to {output} ({size / (1 << 30):.2f} GiB of weights).", soft_wrap=True)
    if model.can_generate():
        console.print(f"Talk to it: trl-fast chat {output}", soft_wrap=True)
    if hub_name is not None:
        upload(output, hub_name)
        console.print(f"Uploaded to https://huggingface.co/{hub_name}.", soft_wrap=True)
    return 0


def upload(folder: Path, hub_name: str) -> None:
    """Uploads a folder to a repository of the hub, which is made if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(hub_name, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository.repo_id)
