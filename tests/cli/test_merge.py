"""`trl-fast merge`: the whole model says what the adapter on its base says."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)

from support.low_bit import quantization
from support.missing_packages import hide_packages
from support.models import save_tiny_classifier, save_tiny_model
from support.tokenizer import build_tokenizer
from support.vision_processors import pictures, save_tiny_vision_model
from trl_fast.cli import merge as merge_command
from trl_fast.cli.main import main
from trl_fast.modeling.adapter_folder import probe_scores
from trl_fast.modeling.low_bit_layers import compute_alike


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), build_tokenizer())


def save_adapter(folder, base, config=None, *, scale=0.2, auto=AutoModelForCausalLM, tokenizer=True):
    """Writes an adapter of random weights, and a tokenizer, as training does; the folder's name."""
    torch.manual_seed(1)
    config = config or LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(auto.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "score" not in name:
            weight.data.normal_(std=scale)
    model.save_pretrained(folder)
    if tokenizer:
        build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(base, tmp_path):
    return save_adapter(tmp_path / "adapter", base)


@pytest.fixture
def run(capsys, tmp_path):
    """Runs the command; returns exit status, standard output in one line and the last line of standard error."""

    def run(adapter, *flags, output="whole"):
        words = [] if output is None else ["--output", str(tmp_path / output)]
        status = main(["merge", *([adapter] if adapter else []), *words, *flags])
        shown = capsys.readouterr()
        return status, " ".join(shown.out.split()), (shown.err.strip().splitlines() or [""])[-1]

    return run


def logits(model, ids=(5, 6, 7, 8, 9)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, target_modules=["q_proj", "down_proj"]),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "dora", "whole head", "ia3"],
)
def test_the_merged_model_is_the_adapters(config, base, run, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base, config)
    status, out, _ = run(adapter)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    assert status == 0 and torch.allclose(logits(whole), expected, atol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), expected, atol=1e-2)
    assert "log-probs of the merged model differ by" in out and f"Talk to it: trl-fast chat {tmp_path}/whole" in out


def test_tokenizer_generation_config_and_card_are_there(adapter, run, tmp_path):
    assert run(adapter)[0] == 0
    whole = tmp_path / "whole"
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert tokenizer.chat_template == build_tokenizer().chat_template
    generation = json.loads((whole / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    card = (whole / "README.md").read_text()
    assert f"The adapter `{adapter}`, merged into" in card and "AutoModelForCausalLM.from_pretrained" in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".merging")] == []


def test_bfloat16_is_compared_within_its_rounding(adapter, run, tmp_path):
    status, out, _ = run(adapter, "--dtype", "bfloat16")
    assert status == 0 and "rounding to bfloat16" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto").dtype == torch.bfloat16


def test_a_reward_model_keeps_its_head(run, tmp_path):
    # Without a pad token in its config, a classifier finds no last token of a padded text.
    base = save_tiny_classifier(tmp_path / "base", build_tokenizer(), pad_token_id=None)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    adapter = save_adapter(tmp_path / "adapter", base, config, auto=AutoModelForSequenceClassification)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(name for name in weights if "score" in name)
    save_file({**weights, name: weights[name] + 1}, tmp_path / "adapter" / "adapter_model.safetensors")
    status, out, _ = run(adapter)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert status == 0 and "rewards of the merged model" in out and "Talk to it" not in out
    assert torch.equal(whole.score.weight, weights[name] + 1) and whole.config.pad_token_id == 2


def test_new_tokens_of_the_tokenizer_get_their_rows(base, run, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    row = len(tokenizer) - 1
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [row]},
        modules_to_save=["lm_head"],
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    status, _, error = run(str(tmp_path / "adapter"))
    assert status == 0, error
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits(whole, (5, row, 6)), logits(adapted, (5, row, 6)), atol=1e-4)


def test_a_merge_that_changes_what_the_model_says_is_refused(adapter, run, tmp_path, monkeypatch):
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self, **_: self.unload(), raising=False)
    status, _, error = run(adapter)
    assert status == 2 and "the merged model is not the adapter's" in error and not (tmp_path / "whole").exists()


def test_a_broken_adapter_is_refused(adapter, run, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({**weights, sorted(weights)[0]: weights[sorted(weights)[0]] * torch.nan}, path)
    status, _, error = run(adapter)
    assert status == 2 and "hold NaN or infinity" in error and not (tmp_path / "whole").exists()


def test_an_adapter_that_changes_nothing_is_told(base, run, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )
    status, out, _ = run(str(tmp_path / "adapter"))
    assert status == 0 and "The adapter changes nothing there" in out
    # Without a tokenizer beside the adapter, the base model's is saved.
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template


def test_nothing_is_overwritten(adapter, run, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "notes.txt").write_text("mine")
    status, _, error = run(adapter)
    assert status == 2 and "is there already, and nothing is overwritten" in error
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["notes.txt"]


def test_the_folder_beside_the_adapter_is_the_default(adapter, run, tmp_path):
    assert run(adapter, output=None)[0] == 0 and (tmp_path / "adapter-merged" / "model.safetensors").is_file()


def test_what_is_no_adapter(base, adapter, run, tmp_path):
    assert "ADAPTER_FOLDER is missing" in run(None)[2]
    assert "it is a whole model already" in run(base)[2]
    assert "there is no such folder" in run(str(tmp_path / "nothing" / "here"))[2]
    (tmp_path / "empty").mkdir()
    assert "give the folder that training wrote" in run(str(tmp_path / "empty"))[2]


def test_several_adapters_and_checkpoints_are_named(base, run, tmp_path):
    for name in ("several/one", "several/two", "run/checkpoint-2", "run/checkpoint-10"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    several = run(str(tmp_path / "several"))[2]
    assert "several adapters" in several and f"{tmp_path}/several/two" in several
    assert f"its newest checkpoint is {tmp_path}/run/checkpoint-10" in run(str(tmp_path / "run"))[2]


def test_a_checkpoint_can_be_merged(base, run, tmp_path):
    assert run(save_adapter(tmp_path / "run" / "checkpoint-2", base))[0] == 0


def test_a_base_model_that_is_gone_or_does_not_fit(adapter, run, tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    status, _, error = run(adapter)
    assert status == 2 and "the base model of" in error and "there is no such folder; see base_model" in error
    other = save_tiny_model(tmp_path / "other", build_tokenizer(), hidden_size=64)
    status, _, error = run(adapter, "--base_model", other)
    assert status == 2 and "does not fit its base model" in error


def test_a_quantized_base_is_refused(adapter, run, base, tmp_path):
    other = tmp_path / "quantized"
    other.mkdir()
    config = json.loads(AutoModelForCausalLM.from_pretrained(base).config.to_json_string())
    (other / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    status, _, error = run(adapter, "--base_model", str(other))
    assert status == 2 and "are quantized (gptq)" in error and "16-bit" in error


def test_virtual_tokens_cannot_be_merged(base, run, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    status, _, error = run(adapter)
    assert status == 2 and "virtual tokens" in error


def test_it_uploads_where_asked(adapter, run, tmp_path, monkeypatch):
    calls = []
    api = SimpleNamespace(
        create_repo=lambda name, exist_ok: SimpleNamespace(repo_id=name),
        upload_folder=lambda folder_path, repo_id: calls.append((str(folder_path), repo_id)),
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    status, out, _ = run(adapter, "--push_to_hub", "me/whole")
    assert status == 0 and calls == [(str(tmp_path / "whole"), "me/whole")] and "huggingface.co/me/whole" in out
    assert 'from_pretrained("me/whole"' in (tmp_path / "whole" / "README.md").read_text()


def test_models_are_compared_in_float32_whatever_their_dtype(base):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    found = probe_scores(model, ids)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    rounded = logits(model)[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    expected = probe_scores(model.float(), ids)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(rounded, expected, atol=1e-3)


def test_rounding_that_loses_the_adapter_is_told():
    assert merge_command.Check(error=0.02, effect=0.03).loses
    assert not merge_command.Check(error=0.01, effect=0.5).loses and not merge_command.Check(1e-5, 0.0).loses


def test_a_model_that_reads_images_keeps_its_processor(run, tmp_path):
    """That of its base model, where there is none beside the adapter."""
    base = save_tiny_vision_model(tmp_path / "base", "qwen2_5_vl")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    adapter = save_adapter(tmp_path / "adapter", base, config, auto=AutoModelForImageTextToText, tokenizer=False)
    assert run(adapter)[0] == 0
    whole = tmp_path / "whole"
    picture = pictures(1)
    processors = [AutoProcessor.from_pretrained(folder) for folder in (base, whole)]
    given, found = (each(text="<|image_pad|>", images=picture, return_tensors="pt") for each in processors)
    assert torch.equal(found["pixel_values"], given["pixel_values"])
    assert "= AutoModelForImageTextToText.from_pretrained" in (whole / "README.md").read_text()
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    merged = AutoModelForImageTextToText.from_pretrained(whole).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**found).logits, adapted(**given).logits, rtol=1e-4, atol=1e-4)


def low_bit_adapter(tmp_path, kind, **more):
    """An adapter of random weights, as if trained on a base of low bits, in tmp_path/low; what both say of tokens."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = save_tiny_model(tmp_path / "wide", build_tokenizer(), hidden_size=64)
    adapter = save_adapter(tmp_path / "adapter", base)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization(kind, **more))
    compute_alike(model)
    tokens = torch.tensor([merge_command.probe_ids(build_tokenizer())])
    model.save_pretrained(tmp_path / "low")
    return adapter, probe_scores(PeftModel.from_pretrained(model, adapter), tokens), tokens


@pytest.mark.parametrize(
    "kind, flags, more",
    [
        ("nf4", ["--load_in_4bit"], {}),
        ("int8", ["--load_in_8bit"], {}),
        ("fp4", ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4"], {}),
        ("nf4", ["--load_in_4bit", "--use_bnb_nested_quant"], {"bnb_4bit_use_double_quant": True}),
    ],
    ids=["nf4", "int8", "fp4", "nested"],
)
def test_an_adapter_goes_into_the_weights_that_it_was_trained_on(kind, flags, more, run, tmp_path):
    adapter, scores, tokens = low_bit_adapter(tmp_path, kind, **more)
    for output, given in (("dequantized", flags), ("stored", [])):
        assert run(adapter, *given, output=output)[0] == 0
    errors = {}
    for output in ("dequantized", "stored"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / output)
        assert not hasattr(merged.config, "quantization_config") and merged.dtype == torch.float32
        assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
        errors[output] = (probe_scores(merged, tokens) - scores).abs().mean()
    # The base's own weights are others than those that the adapter was trained on.
    assert errors["dequantized"] < 1e-4 < errors["stored"]


def test_a_base_whose_files_are_low_bit_is_dequantized(run, tmp_path):
    adapter, scores, tokens = low_bit_adapter(tmp_path, "nf4")
    status, _, error = run(adapter, "--base_model", str(tmp_path / "low"), "--load_in_4bit")
    assert status == 2 and "quantized already; leave load_in_4bit and load_in_8bit out" in error
    status, _, error = run(adapter, "--base_model", str(tmp_path / "low"))
    assert status == 0, error
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(probe_scores(merged, tokens), scores, rtol=1e-4, atol=1e-4)


def test_merging_into_low_bits_needs_bitsandbytes(adapter, run, monkeypatch):
    hide_packages(monkeypatch, "bitsandbytes")
    status, _, error = run(adapter, "--load_in_8bit")
    assert status == 2 and "load_in_8bit=True needs bitsandbytes: `pip install 'trl-fast[qlora]'`" in error
    status, _, error = run(adapter, "--load_in_8bit", "--load_in_4bit")
    assert status == 2
