"""Generation by transformers: equal to its own `generate`, with each prompt read once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from support.models import tiny_model
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.rollout import SamplingSettings, TransformersEngine
from trl_fast.rollout.transformers_engine import can_share_prompts

END, PAD = 1, 2
GREEDY = SamplingSettings(12, generation_kwargs={"do_sample": False})
# Groups of two and three, one prompt that comes once, one of a single token.
LENGTHS = {5: 3, 20: 2, 1: 2, 9: 1}


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


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma", "qwen3_moe", "gemma2", "mistral"])
def test_greedy_equals_single_forwards(family, prompts):
    changes = {"mistral": {"sliding_window": 8}}.get(family, {})
    model = tiny_model(family, **changes)
    rollout = TransformersEngine(model, {END}, PAD).generate(prompts, GREEDY)
    assert rollout.completion_ids == greedy_one_by_one(model, prompts)
    assert rollout.prompt_ids == prompts
    assert rollout.logprobs is None


def test_a_prompt_is_read_once(prompts):
    model = tiny_model()
    shapes = tokens_read(model)
    TransformersEngine(model, {END}, PAD).generate(
        prompts, SamplingSettings(3, generation_kwargs={"min_new_tokens": 3})
    )
    assert shapes == [(4, 20)] + [(8, 1)] * 3


def test_different_prompts_are_read_together(prompts):
    model = tiny_model()
    shapes = tokens_read(model)
    different = [prompts[0], prompts[3]]
    TransformersEngine(model, {END}, PAD).generate(
        different, SamplingSettings(2, generation_kwargs={"min_new_tokens": 2})
    )
    assert shapes == [(2, 20), (2, 1)]


@pytest.mark.parametrize(
    ("family", "changes", "settings", "shares"),
    [
        ("llama", {}, {}, True),
        ("llama", {}, {"cache_implementation": "dynamic"}, False),
        ("llama", {}, {"cache_implementation": "static"}, False),
        ("llama", {}, {"use_cache": False}, False),
        ("mistral", {"sliding_window": 8}, {}, False),
        ("gemma2", {}, {}, False),
        ("mamba", {}, {}, False),
        ("falcon_h1", {}, {}, False),
    ],
)
def test_which_models_share(family, changes, settings, shares):
    config = GenerationConfig(**{"use_cache": True, **settings})
    assert can_share_prompts(tiny_model(family, **changes), config) == shares


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


@pytest.mark.parametrize(
    ("name", "value"), [("num_return_sequences", 2), ("num_beams", 4), ("return_dict_in_generate", True)]
)
def test_refused_generation_kwargs(name, value, prompts):
    settings = SamplingSettings(4, generation_kwargs={name: value})
    with pytest.raises(ValueError, match=f"generation_kwargs: {name}={value} cannot be used"):
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
