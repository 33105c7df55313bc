"""A cloned chat template leaves the same model and tokenizer as TRL's."""

import pytest
import torch
import trl

import trl_fast
from support.models import tiny_model
from support.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def source_path(tmp_path_factory):
    source = build_tokenizer()
    source.add_tokens(["<tool>", "<|im_start|>"])
    source.add_special_tokens({"eos_token": "<|endofturn|>"})
    source.chat_template = "{% for message in messages %}{{ message.content }}<|endofturn|>{% endfor %}"
    path = tmp_path_factory.mktemp("source")
    source.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("multiple", [64, None, 1])
def test_it_is_what_trl_makes(multiple, source_path):
    results = []
    for module in (trl_fast, trl):
        tokenizer = build_tokenizer()
        model = tiny_model(vocab_size=len(tokenizer))
        torch.manual_seed(0)
        results.append(module.clone_chat_template(model, tokenizer, source_path, multiple))
    (ours, our_tokenizer, our_new), (theirs, their_tokenizer, their_new) = results
    assert our_new == their_new and len(our_new) >= 2
    assert our_tokenizer.get_vocab() == their_tokenizer.get_vocab()
    assert our_tokenizer.chat_template == their_tokenizer.chat_template
    assert our_tokenizer.eos_token == their_tokenizer.eos_token == "<|endofturn|>"
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert len(our_tokenizer.get_vocab()) == ours.get_input_embeddings().num_embeddings
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_source_without_template_is_named(tmp_path):
    source = build_tokenizer()
    source.chat_template = None
    source.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chat_template"):
        trl_fast.clone_chat_template(tiny_model(), build_tokenizer(), str(tmp_path))
