"""Reading a processor's chat template as a tokenizer's."""

from support.tokenizer import build_tokenizer
from support.vision_processors import tiny_processor
from trl_fast.data.text_side import text_side

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def test_a_processor_answers_as_its_tokenizer_with_its_own_template():
    processor = tiny_processor("qwen2_5_vl")
    reader = text_side(processor)
    tokens = reader.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]
    assert [tokens] == processor.apply_chat_template(parts, tokenize=True, return_dict=True)["input_ids"]
    assert reader.eos_token == processor.tokenizer.eos_token and reader.name_or_path == "Qwen2_5_VLProcessor"
    processor.chat_template = {"default": "{{ messages[0].content[0].text }}", "tool_use": "other"}
    assert text_side(processor).apply_chat_template(MESSAGES, tokenize=False) == "Hello"


def test_a_tokenizer_stays_as_it_is():
    tokenizer = build_tokenizer()
    assert text_side(tokenizer) is tokenizer
