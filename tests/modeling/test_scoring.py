"""A model on token batches: every layout gives the scores and gradients of the model's own logits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface

from support.models import FAMILIES, tiny_model
from trl_fast.data import pack_trees
from trl_fast.modeling import scoring as scoring_module
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import SEGMENT_ATTENTION, segment_attention, use_segment_attention
from trl_fast.modeling.verification import verify

OUTPUTS = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def prepared(family, packed=True, **changes):
    model = tiny_model(family, **changes)
    attach_scoring(model)
    if packed:
        use_segment_attention(model)
    return model


def own_scores(model, trees):
    """The scores by the model's own forward: one sequence at a time, whole logits, plain SDPA."""
    parts = {name: [] for name in OUTPUTS}
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([tree.prompt_ids + branch])
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(branch) - 1 : -1].float()
            logp = logits.log_softmax(-1)
            targets = torch.tensor(branch)
            parts["logprobs"].append(logp.gather(1, targets[:, None]).squeeze(1))
            parts["entropy"].append(-(logp.exp() * logp).sum(-1))
            parts["log_sum_sq_probs"].append((2 * logp).logsumexp(-1))
            parts["mean_logits"].append(logits.mean(-1))
            parts["is_top1"].append(logits.argmax(-1) == targets)
    return {name: torch.cat(values) for name, values in parts.items()}


def gradients(model, tokens):
    weights = torch.linspace(-1, 1, len(tokens.logprobs))
    model.zero_grad()
    (weights * tokens.logprobs + 0.1 * weights.flip(0) * tokens.entropy).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["keep", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_the_models_logits(family, checkpointing, layout, trees):
    model = prepared(family, packed=layout == "packed")
    expected = own_scores(model, trees)
    expected_gradients = gradients(model, scoring_module.TokenScores(**expected))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    tokens = score(model, pack_trees(trees, layout, 2), outputs=OUTPUTS).tokens
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(tokens, name), value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert_same_gradients(gradients(model, tokens), expected_gradients)


@pytest.mark.parametrize(
    ("target", "biased"), [(["q_proj", "v_proj"], False), (["q_proj", "lm_head"], False), (["lm_head"], True)]
)
def test_lora_also_on_the_head(target, biased, trees):
    config = LoraConfig(target_modules=target, init_lora_weights=False, lora_bias=biased, task_type="CAUSAL_LM")
    model = get_peft_model(prepared("llama"), config)
    expected = own_scores(model, trees)
    expected_gradients = gradients(model, scoring_module.TokenScores(**expected))
    tokens = score(model, pack_trees(trees, "packed", 2), outputs=OUTPUTS).tokens
    torch.testing.assert_close(tokens.logprobs, expected["logprobs"], rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(model, tokens), expected_gradients)
    with model.disable_adapter(), torch.no_grad():
        off = score(model, pack_trees(trees, "packed", 2)).tokens.logprobs
        torch.testing.assert_close(off, own_scores(model, trees)["logprobs"], rtol=1e-4, atol=1e-4)
    assert (off - tokens.logprobs).abs().max() > 1e-3


def test_a_saved_copy_of_the_head_is_followed(trees):
    model = get_peft_model(
        prepared("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        base_model(model).get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
        tokens = score(model, pack_trees(trees, "packed", 2)).tokens.logprobs
        torch.testing.assert_close(tokens, own_scores(model, trees)["logprobs"], rtol=1e-4, atol=1e-4)


def test_only_scored_rows_reach_the_head_and_no_padding_the_model(trees, monkeypatch):
    seen = {}
    original = scoring_module.token_logprobs

    def spy(hidden, *args, **kwargs):
        seen["head rows"] = len(hidden)
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(scoring_module, "token_logprobs", spy)
    model = prepared("llama")
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.update(positions=inputs[0].numel()))
    score(model, pack_trees(trees, "packed", 2))
    scored = sum(len(branch) for tree in trees for branch in tree.branches)
    prompts = sum(len(tree.prompt_ids) * len(tree.branches) for tree in trees)
    assert seen == {"head rows": scored, "positions": scored + prompts}


def test_no_square_mask_is_built(trees, monkeypatch):
    model = prepared("llama")
    masks = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return segment_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, SEGMENT_ATTENTION, spy)
    score(model, pack_trees(trees, "packed", 2))
    assert len(masks) == 2 and all(mask.numel() == 1 for mask in masks)


def test_generation_is_unchanged():
    plain, ours = tiny_model("llama").eval(), prepared("llama").eval()
    prompts = torch.tensor([[5, 6, 7, 8], [2, 2, 9, 10]])
    mask = (prompts != 2).long()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    expected = plain.generate(prompts, attention_mask=mask, **options)
    assert torch.equal(ours.generate(prompts, attention_mask=mask, **options), expected)


def test_a_copy_of_the_model_runs_its_own_weights(trees):
    model = prepared("llama")
    twin = copy.deepcopy(model)
    expected = own_scores(model, trees)
    for weight in model.parameters():
        weight.data.zero_()
    assert torch.equal(own_scores(twin, trees)["logprobs"], expected["logprobs"])


def test_mixture_of_experts_returns_its_balancing_loss(trees):
    model = prepared("mixtral", packed=False, num_local_experts=4, num_experts_per_tok=2)
    batch = pack_trees(trees, "padded", 2)
    scores = score(model, batch, output_router_logits=True)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    torch.testing.assert_close(scores.aux_loss, model(**inputs, output_router_logits=True).aux_loss)
    assert score(model, batch).aux_loss is None


def test_autocast_reaches_the_head(trees):
    model = prepared("llama")
    batch = pack_trees(trees, "packed", 2)
    exact = score(model, batch).tokens.logprobs
    with torch.autocast("cpu", torch.bfloat16):
        rounded = score(model, batch).tokens.logprobs
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - exact).abs().max() < 0.5


# ---- what no config tells


class Shifted(torch.nn.Module):
    """A head that does to its logits what no configuration mentions."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    @property
    def weight(self):
        return self.head.weight

    def forward(self, hidden):
        return self.head(hidden).sin()


def test_an_unknown_head_is_noticed_and_scored_by_its_own_logits(trees):
    model = prepared("llama")
    model.lm_head = Shifted(model.lm_head)
    verdict = verify(model, [[5, 6, 7], [8, 9, 10, 11]], layout="packed")
    assert not verdict.fused_ok and verdict.packed_ok
    model.trl_fast_fused_head = False
    expected = own_scores(model, trees)
    expected_gradients = gradients(model, scoring_module.TokenScores(**expected))
    for layout in ("packed", "padded"):
        tokens = score(model, pack_trees(trees, layout, 2), outputs=OUTPUTS).tokens
        for name, value in expected.items():
            torch.testing.assert_close(getattr(tokens, name), value, rtol=1e-4, atol=1e-4)
        assert_same_gradients(gradients(model, tokens), expected_gradients)


def test_a_model_that_mixes_sequences_is_noticed():
    model = prepared("llama")
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _, __, output: output + output.mean(dim=1, keepdim=True))
    verdict = verify(model, [[5, 6, 7], [8, 9, 10, 11]], layout="packed")
    assert verdict.fused_ok and not verdict.packed_ok


def test_a_good_model_passes_and_keeps_its_modes():
    model = prepared("gemma")
    model.model.layers[0].eval()
    verdict = verify(model, [[5, 6, 7], [8, 9, 10, 11]], layout="packed")
    assert verdict.fused_ok and verdict.packed_ok
    assert model.training and not model.model.layers[0].training
