"""Chat templates and end tokens from elsewhere; a cloned template leaves the same model and tokenizer as TRL's."""

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import trl_fast
from support.models import tiny_model
from support.tokenizer import build_tokenizer
from trl_fast.modeling.chat_template import (
    SIMPLE_CHAT_TEMPLATE,
    set_chat_template,
    set_eos_token,
    with_trained_tokens,
)


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


def test_a_template_from_a_file_or_from_another_tokenizer(source_path, tmp_path):
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    assert set_chat_template(model, tokenizer, str(file)) == []
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    new = set_chat_template(model, tokenizer, source_path)
    assert tokenizer.eos_token == "<|endofturn|>" and tokenizer.eos_token_id in new
    for missing in ("no-such-tokenizer", str(tmp_path / "other.jinja")):
        with pytest.raises(OSError, match=f"chat_template_path='{missing}'"):
            set_chat_template(model, tokenizer, missing)


CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Blue."}]


def base_model_and_tokenizer():
    """Of a model that has never seen a conversation."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    return tiny_model(vocab_size=3, pad_token_id=None), tokenizer


@pytest.mark.parametrize("multiple, rows", [(None, 5), (8, 8)])
def test_chatml_is_set_up_as_trl_did(multiple, rows):
    model, tokenizer = base_model_and_tokenizer()
    with pytest.warns(FutureWarning, match="`setup_chat_format` is a name of an older TRL") as warned:
        ours, same = trl_fast.setup_chat_format(model, tokenizer, resize_to_multiple_of=multiple)
    assert ours is model and same is tokenizer and warned[0].filename == __file__
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [3, 4]
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert tokens == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert {3, 4} <= set(tokenizer.all_special_ids)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, 4, 4)
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == rows
    assert model.config.vocab_size == rows
    text = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_chat_format_is_not_set_up_twice_and_there_is_one_only():
    model, tokenizer = base_model_and_tokenizer()
    with pytest.raises(ValueError, match="format='alpaca' is unknown; the only one is 'chatml'"):
        trl_fast.setup_chat_format(model, tokenizer, format="alpaca")
    trl_fast.setup_chat_format(model, tokenizer)
    with pytest.raises(ValueError, match="has a chat template already; .*tokenizer.chat_template = None"):
        trl_fast.setup_chat_format(model, tokenizer)
    tokenizer.chat_template = None
    trl_fast.setup_chat_format(model, tokenizer)
    assert len(tokenizer) == len(model.get_input_embeddings().weight) == 5


def test_the_simple_template_of_older_scripts():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "User: What is it?\n\nAssistant: Blue.\n\n"
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "User: What is it?\n\nAssistant:"


def test_another_end_token():
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    set_eos_token(model, tokenizer, "<think>")
    eos = tokenizer.eos_token_id
    assert tokenizer.decode(eos) == "<think>" and model.config.eos_token_id == eos
    assert model.generation_config.eos_token_id == [eos, 1]
    with pytest.raises(ValueError, match="eos_token='<none>'"):
        set_eos_token(model, tokenizer, "<none>")


@pytest.mark.parametrize("given", [None, [3], {"embed_tokens": [3]}])
def test_new_tokens_train_beside_an_adapter(given):
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=given)
    model = tiny_model()
    changed = with_trained_tokens(config, model, [7, 8])
    assert changed.trainable_token_indices == {"embed_tokens": [7, 8] if given is None else [3, 7, 8]}
    assert config.trainable_token_indices == given
    adapted = get_peft_model(model, changed)
    assert any("token_adapter" in name for name, p in adapted.named_parameters() if p.requires_grad)
