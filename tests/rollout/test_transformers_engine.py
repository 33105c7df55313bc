"""Generation by transformers: equal to its own `generate`, with each prompt read once."""

import re

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import GenerationConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from support.families import WINDOWED, WITH_SHARED_KEYS, WITH_SINKS, WITH_STATES
from support.models import tiny_config, tiny_model
from support.tokenizer import build_tokenizer
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.rollout import SamplingSettings, TransformersEngine
from trl_fast.rollout.prompt_cache import why_prompts_are_not_shared
from trl_fast.rollout.transformers_engine import _say_once

END, PAD = 1, 2
GREEDY = SamplingSettings(12, generation_kwargs={"do_sample": False})
# Groups of two and three, one prompt that comes once, one of two tokens.
LENGTHS = {5: 3, 20: 2, 2: 2, 9: 1}


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    different = {length: torch.randint(3, 340, (length,), generator=generator).tolist() for length in LENGTHS}
    return [different[length] for length, count in LENGTHS.items() for _ in range(count)]


def greedy_one_by_one(model, prompts, steps=12):
    """Tokens by plain forwards: no padding, no cache, no `generate`."""
    training = model.training
    model.eval()
    completions = []
    for prompt in prompts:
        row = list(prompt)
        while len(row) < len(prompt) + steps and row[-1:] != [END] or len(row) == len(prompt):
            with torch.no_grad():
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        completions.append(row[len(prompt) :])
    model.train(training)
    return completions


def tokens_read(model):
    """A list that gets the shape of every input of the model's embedding."""
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


# The others of their kinds are slow tests.
QUICK = ["lfm2", "gemma4_text"]
TODAY = {
    **{**WINDOWED, **WITH_SINKS, **WITH_STATES, **WITH_SHARED_KEYS},
    "lfm3, window": {
        **{"num_hidden_layers": 3, "sliding_window": 6},
        "layer_types": ["conv", "sliding_attention", "full_attention"],
    },
}
# It has no attention, and a cache of its own kind.
del TODAY["mamba2"]


@pytest.mark.parametrize(
    "family",
    [
        *["llama", "gpt2", pytest.param("qwen3_moe", marks=pytest.mark.slow)],
        *(name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TODAY),
    ],
)
def test_greedy_equals_single_forwards(family, prompts):
    """Whose prompts are read once: keys and values, windows of them, and states of recurrent layers."""
    model = tiny_model(family.split(",")[0], **TODAY.get(family, {}))
    shapes = tokens_read(model)
    rollout = TransformersEngine(model, {END}, PAD).generate(prompts, GREEDY)
    assert shapes[:2] == [(4, 19), (8, 1)]
    assert rollout.completion_ids == greedy_one_by_one(model, prompts)
    assert rollout.prompt_ids == prompts
    assert rollout.logprobs is None
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=END, pad_token_id=PAD)
    rows = model.eval().generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    assert rollout.completion_ids == [row[: row.index(END) + 1] if END in row else row for row in rows]


def test_a_prompt_is_read_once(prompts):
    model = tiny_model()
    shapes = tokens_read(model)
    TransformersEngine(model, {END}, PAD).generate(
        prompts, SamplingSettings(3, generation_kwargs={"min_new_tokens": 3})
    )
    assert shapes == [(4, 19)] + [(8, 1)] * 3


def test_different_prompts_are_read_together(prompts):
    model = tiny_model()
    shapes = tokens_read(model)
    different = [prompts[0], prompts[3]]
    TransformersEngine(model, {END}, PAD).generate(
        different, SamplingSettings(2, generation_kwargs={"min_new_tokens": 2})
    )
    assert shapes == [(2, 20), (2, 1)]


NOT_SHARED = {
    "a named cache": ("llama", {}, {"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
    "no cache": ("llama", {}, {"use_cache": False}, "use_cache=False"),
    "chunks": ("llama", {}, {"prefill_chunk_size": 4}, "prefill_chunk_size=4"),
    "beams": ("llama", {}, {"num_beams": 2}, "num_beams=2: each beam"),
    "one token": ("llama", {}, {}, "a prompt has one token only"),
    "no attention": ("mamba", {}, {}, "MambaForCausalLM has a cache of its own kind"),
    "a cache of its own": ("minimax", {"num_local_experts": 4}, {}, "MiniMaxForCausalLM has a cache of its own kind"),
    "compressed keys": ("deepseek_v4", {}, {}, "rows cannot be repeated: DeepseekV4HCACache"),
    "states in layers": (
        "recurrent_gemma",
        {"block_types": ["recurrent", "attention"], "attention_window_size": 6},
        {},
        "layers of RecurrentGemmaForCausalLM keep states themselves",
    ),
}


@pytest.mark.parametrize(("family", "changes", "settings", "reason"), NOT_SHARED.values(), ids=NOT_SHARED)
def test_why_prompts_are_not_shared(family, changes, settings, reason, prompts, caplog):
    """It is said once, and the prompts are given to `generate` as they are."""
    model = tiny_model(family, **changes)
    prompts += [[5]] * ("one token" in reason)
    shapes = tokens_read(model)
    engine = TransformersEngine(model, {END}, PAD)
    _say_once.cache_clear()
    for _ in range(2):
        engine.generate(prompts, SamplingSettings(1, generation_kwargs=settings))
    (record,) = [record for record in caplog.records if record.name.startswith("trl_fast")]
    assert re.search(f"each prompt once a completion: .*{reason}", record.message)
    assert all(rows >= len(prompts) for rows, _ in shapes)


def test_virtual_tokens_are_not_shared():
    model = get_peft_model(tiny_model(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    reason = why_prompts_are_not_shared(model, GenerationConfig(use_cache=True))
    assert "PREFIX_TUNING puts virtual tokens in front of prompts" in reason


def test_random_numbers_are_those_of_a_plain_generation(prompts):
    """Sampled completions do not depend on whether prompts are read once."""
    sampled = []
    for shared in (True, False):
        torch.manual_seed(0)
        settings = SamplingSettings(6, generation_kwargs=None if shared else {"cache_implementation": "dynamic"})
        sampled.append(TransformersEngine(tiny_model(), {END}, PAD).generate(prompts, settings).completion_ids)
    assert sampled[0] == sampled[1]


def test_text_for_a_model_that_reads_images(prompts):
    """Whose positions have three axes, which the model keeps beside the cache."""
    text = tiny_config("qwen3_5_text", **WITH_STATES["qwen3_5_text"]).to_dict()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    model = Qwen3_5ForConditionalGeneration._from_config(config).float()
    rollout = TransformersEngine(model, {END}, PAD).generate(prompts, GREEDY)
    assert rollout.completion_ids == greedy_one_by_one(model, prompts)


def test_static_cache_gives_the_same(prompts):
    model = tiny_model()
    settings = SamplingSettings(6, generation_kwargs={"do_sample": False}, cache_implementation="static")
    completions = TransformersEngine(model, {END}, PAD).generate(prompts, settings).completion_ids
    assert completions == greedy_one_by_one(model, prompts, steps=6)


def test_segment_attention_and_adapters_generate(prompts):
    model = tiny_model()
    use_segment_attention(model)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.enable_input_require_grads()
    completions = TransformersEngine(lambda: model, {END}, PAD).generate(prompts, GREEDY).completion_ids
    assert completions == greedy_one_by_one(model, prompts)
    with model.disable_adapter():
        assert completions != greedy_one_by_one(model, prompts)


def test_model_is_left_as_it_was(prompts):
    model = tiny_model("llama", attention_dropout=0.5)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    engine = TransformersEngine(model, {END}, PAD)
    completions = engine.generate(prompts, GREEDY).completion_ids
    assert completions == engine.generate(prompts, GREEDY).completion_ids
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    assert model.config.use_cache is False
    with pytest.raises(RuntimeError, match="interrupted"):
        interrupt(model, engine, prompts)
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing


def interrupt(model, engine, prompts):
    def stop(module, args):
        raise RuntimeError("interrupted")

    handle = model.lm_head.register_forward_pre_hook(stop)
    try:
        engine.generate(prompts, GREEDY)
    finally:
        handle.remove()


def test_completions_end_with_the_first_end_token(prompts):
    model = tiny_model()
    settings = SamplingSettings(40, temperature=2.0)
    torch.manual_seed(0)
    ends = set(range(100, 140))
    completions = TransformersEngine(model, ends, PAD).generate(prompts, settings).completion_ids
    assert any(completion[-1] in ends for completion in completions)
    for completion in completions:
        assert not set(completion[:-1]) & ends
        assert len(completion) == 40 or completion[-1] in ends


def test_pad_token_may_be_the_end_token(prompts):
    model = tiny_model()
    completions = TransformersEngine(model, {END}, END).generate(prompts, GREEDY).completion_ids
    assert completions == greedy_one_by_one(model, prompts)


def test_samples_follow_the_distribution():
    model, prompt = tiny_model(vocab_size=8, pad_token_id=2), [3, 4, 5]
    torch.manual_seed(0)
    settings = SamplingSettings(1, temperature=0.7)
    completions = TransformersEngine(model, {END}, PAD).generate([prompt] * 4000, settings).completion_ids
    counts = torch.bincount(torch.tensor(completions).flatten(), minlength=8) / 4000
    expected = (model.eval()(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)


# As in TRL, whose trainer hands them to `generate` with the prompts padded on the left.
SAMPLED = {
    "beams": {"num_beams": 2},
    "greedy beams": {"num_beams": 3, "do_sample": False, "length_penalty": 0.5, "early_stopping": True},
    "forced end": {"forced_eos_token_id": END, "max_new_tokens": 5},
    "suppressed": {"suppress_tokens": [5, 6], "bad_words_ids": [[7], [8, 9]], "begin_suppress_tokens": [END]},
    "penalties": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2},
    "truncation": {"min_p": 0.02, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
    "lengths": {"min_new_tokens": 4, "exponential_decay_length_penalty": (2, 1.5)},
    "bias": {"sequence_bias": [[[10], 5.0]], "remove_invalid_values": True, "renormalize_logits": True},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 2},
    "None": {"eos_token_id": None, "pad_token_id": None, "max_new_tokens": None},
}


@pytest.mark.parametrize("given", SAMPLED.values(), ids=SAMPLED.keys())
def test_generation_kwargs_are_those_of_generate(given, prompts):
    model = tiny_model()
    settings = SamplingSettings(8, generation_kwargs=given)
    engine = TransformersEngine(model, {END}, PAD)
    state = torch.get_rng_state()
    engine.try_out(settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    completions = engine.generate(prompts, settings).completion_ids
    given = {name: value for name, value in given.items() if value is not None}
    values = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": [END], "pad_token_id": PAD, "top_k": 0, **given}
    width = max(map(len, prompts))
    rows = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    torch.manual_seed(0)
    expected = model.eval().generate(
        input_ids=rows, attention_mask=(rows != PAD).long(), generation_config=GenerationConfig(**values)
    )
    for completion, row in zip(completions, expected[:, width:].tolist(), strict=True):
        assert completion == row[: row.index(END) + 1 if END in row else len(row)]


def test_what_only_the_models_generation_config_says(prompts):
    model = tiny_model()
    model.generation_config.suppress_tokens = list(range(3, 300))
    model.generation_config.num_beams = 2
    for completion in TransformersEngine(model, {END}, PAD).generate(prompts, SamplingSettings(6)).completion_ids:
        assert not set(completion) & set(range(3, 300))


@pytest.mark.parametrize("pad", [PAD, END])
@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings_end_completions(pad, beams, prompts):
    model, tokenizer = tiny_model(), build_tokenizer()
    stop = ["e", "q"]
    given = {"stop_strings": stop, "num_beams": beams, "suppress_tokens": [END, PAD], "do_sample": beams == 1}
    settings = SamplingSettings(60, generation_kwargs=given)
    engine = TransformersEngine(model, {END}, pad, tokenizer)
    engine.try_out(settings)
    torch.manual_seed(0)
    completions = engine.generate(prompts, settings).completion_ids
    if beams == 1:
        assert len({len(ids) for ids in completions}) > 1
        for ids in completions:
            before, text = tokenizer.decode(ids[:-1]), tokenizer.decode(ids)
            assert not any(string in before for string in stop)
            assert len(ids) == 60 or any(string in text for string in stop)
    with pytest.raises(ValueError, match="fails with stop_strings=.*need a tokenizer"):
        TransformersEngine(model, {END}, pad).try_out(settings)


REFUSED = {
    "num_return_sequences": (2, "num_return_sequences=2 cannot be used; leave it out"),
    "return_dict_in_generate": (True, "return_dict_in_generate=True cannot be used"),
    "max_length": (40, "max_length=40 would count prompts too; leave it out and set max_completion_length"),
    "temprature": (2, "'temprature' is no setting of transformers' generation; did you mean 'temperature'"),
    "logits_processor": ([], "'logits_processor' is no setting of transformers' generation"),
    "stop": (["."], "'stop' is no setting of transformers' generation"),
    "prompt_lookup_num_tokens": (2, "fails with prompt_lookup_num_tokens=2: .*batch_size = 1"),
    "constraints": ([1], r"fails with constraints=\[1\]: "),
    "force_words_ids": ([[5]], r"fails with force_words_ids=\[\[5\]\]: "),
    "dola_layers": ("high", "fails with dola_layers='high': "),
    "num_beams": (0, "fails with num_beams=0: "),
    "max_new_tokens": ("5", "max_new_tokens: expected an integer >= 1, got '5'"),
    "bad_words_ids": ([5], r"fails with bad_words_ids=\[5\]: "),
    "suppress_tokens": ("x", "fails with suppress_tokens='x': "),
    "temperature": (-1.0, "fails with temperature=-1.0: "),
    "cache_implementation": ("none such", "fails with cache_implementation='none such': "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_generation_kwargs(name):
    value, message = REFUSED[name]
    settings = SamplingSettings(4, generation_kwargs={"top_k": 3, name: value})
    with pytest.raises(ValueError, match=f"^generation_kwargs: .*{message}") as caught:
        TransformersEngine(tiny_model(), {END}, PAD).try_out(settings)
    assert "\n" not in str(caught.value) and "top_k" not in str(caught.value)


def test_settings_that_leave_no_probabilities(prompts):
    settings = SamplingSettings(4, repetition_penalty=1e-300)
    with pytest.raises(
        RuntimeError, match="not finite once it is sampled with temperature=1.0, repetition_penalty=1e-3"
    ):
        TransformersEngine(tiny_model(), {END}, PAD).generate(prompts, settings)


def test_refused_prompts():
    engine = TransformersEngine(tiny_model(), {END}, PAD)
    with pytest.raises(ValueError, match="prompt 0 has 250 tokens, .*=7 are more than the 256 positions"):
        engine.generate([[3] * 250], SamplingSettings(7))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[3], []], SamplingSettings(7))


def test_no_end_or_pad_token():
    with pytest.raises(ValueError, match="eos_token_ids is empty"):
        TransformersEngine(tiny_model(), set(), PAD)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        TransformersEngine(tiny_model(), {END}, None)
