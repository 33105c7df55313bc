"""`trl-fast chat`: what is answered, what is remembered, and what a terminal or a pipe sees."""

import io
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from support.models import save_tiny_classifier, save_tiny_model
from support.tokenizer import build_tokenizer
from trl_fast.cli.chat import Conversation
from trl_fast.cli.main import main
from trl_fast.cli.talker import CUT_OFF, STOPPED, AnswerSettings, load_talker

SHORT = ["--temperature", "0", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), build_tokenizer())


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "checkpoint-3")
    build_tokenizer().save_pretrained(folder / "checkpoint-3")
    return str(folder)


@pytest.fixture
def talker(base):
    def talker(path=base, **settings):
        return load_talker(
            str(path), AnswerSettings(**{"max_new_tokens": 6, "temperature": 0, "top_p": 1, **settings})
        )

    return talker


def expected(talker, text):
    """Returns the answer that transformers generates to a conversation of one message."""
    tokenizer, messages = talker.tokenizer, [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = talker.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_answer_is_the_models_and_comes_in_pieces(talker):
    talks, pieces = talker(), []
    talks.answer("What color is the sky?", pieces.append)
    assert "".join(pieces) == expected(talks, "What color is the sky?") and len(pieces) > 1
    assert talks.messages == [
        {"role": "user", "content": "What color is the sky?"},
        {"role": "assistant", "content": "".join(pieces).strip()},
    ]


def test_the_conversation_is_remembered(talker, monkeypatch):
    talks, seen = talker(), []
    generate = talks._generate
    monkeypatch.setattr(talks, "_generate", lambda ids, streamer: seen.append(ids) or generate(ids, streamer))
    talks.reset("Be brief.")
    talks.answer("The sky?", lambda _: None)
    talks.answer("The sea?", lambda _: None)
    text = talks.tokenizer.decode(seen[1][0])
    assert all(word in text for word in ("Be brief.", "The sky?", talks.messages[2]["content"], "The sea?"))
    talks.reset(None)
    talks.answer("The sea?", lambda _: None)
    assert "The sky?" not in talks.tokenizer.decode(seen[2][0])


def test_an_answer_that_is_stopped_stays_in_the_conversation(talker, monkeypatch):
    talks = talker(max_new_tokens=20)
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    assert talks.answer("The sky?", write) == STOPPED
    assert talks.messages[-1] == {"role": "assistant", "content": "".join(pieces).strip()}


def test_what_ends_an_answer_is_told(talker, monkeypatch):
    talks = talker()
    assert talks.answer("The sky?", lambda _: None) == CUT_OFF
    monkeypatch.setattr(talks, "_ends", lambda output: True)
    assert talks.answer("The sky?", lambda _: None) is None


def test_the_oldest_turns_make_room(talker):
    talks = talker()
    talks.reset("Be brief.")
    for number in range(12):
        talks.answer(f"Number {number}, the sky and the sea and the sky?", lambda _: None)
    assert talks.messages[0] == {"role": "system", "content": "Be brief."}
    assert not any("Number 0," in message["content"] for message in talks.messages)
    assert talks.messages[-2]["content"].startswith("Number 11")
    with pytest.raises(ValueError, match="the model has room for 250 before an answer"):
        talks.answer("the sky " * 300, lambda _: None)


def test_without_a_chat_template_text_is_completed(talker, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    talks = talker(save_tiny_model(tmp_path / "plain", tokenizer))
    pieces = []
    talks.answer("What color is", pieces.append)
    inputs = tokenizer("What color is", return_tensors="pt")
    output = talks.model.generate(**{k: inputs[k] for k in ("input_ids",)}, max_new_tokens=6, do_sample=False)
    assert "".join(pieces) == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_adapter_answers_and_a_folder_of_checkpoints_gives_its_newest(talker, adapter):
    for path in (adapter, f"{adapter}/checkpoint-3"):
        talks, pieces = talker(path), []
        talks.answer("The sky?", pieces.append)
        assert "".join(pieces) == expected(talks, "The sky?") and "with an adapter" in talks.description
    with talks.model.disable_adapter():
        assert expected(talks, "The sky?") != "".join(pieces)


# ---- the command


def chat(capsys, monkeypatch, *words, lines=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    try:
        status = main(["chat", *words])
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    return status, shown.out, " ".join(shown.err.split())


def test_one_question(capsys, monkeypatch, base, talker):
    status, out, _ = chat(capsys, monkeypatch, base, "--prompt", "The sky?", *SHORT)
    assert status == 0 and out == expected(talker(), "The sky?") + "\n"


def test_a_pipe_is_a_turn_a_line(capsys, monkeypatch, base, tmp_path):
    saved = tmp_path / "talk.jsonl"
    lines = f"The sky?\n\nThe sea?\n/save {saved}\n/reset\n/save {saved}\n/nothing\n/quit\nnever\n"
    status, out, notes = chat(capsys, monkeypatch, base, "--system", "Be brief.", *SHORT, lines=lines)
    first, second = (json.loads(line)["messages"] for line in saved.read_text().splitlines())
    assert status == 0 and [message["role"] for message in first] == ["system", *["user", "assistant"] * 2]
    assert second == [{"role": "system", "content": "Be brief."}]
    assert "never" not in str(first) and "There is no command /nothing." in notes
    assert [line.strip() for line in out.splitlines() if line.strip()] == [
        line.strip() for at in (2, 4) for line in first[at]["content"].splitlines() if line.strip()
    ]


def test_system_begins_a_new_conversation(capsys, monkeypatch, base, tmp_path):
    saved = tmp_path / "talk.jsonl"
    chat(capsys, monkeypatch, base, *SHORT, lines=f"The sky?\n/system Speak up.\n/save {saved}\n")
    assert json.loads(saved.read_text())["messages"] == [{"role": "system", "content": "Speak up."}]


def test_a_missing_template_is_told(capsys, monkeypatch, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    path = save_tiny_model(tmp_path / "plain", tokenizer)
    assert "There is no chat template" in chat(capsys, monkeypatch, path, *SHORT, lines="The sky?\n")[2]


def test_a_template_that_refuses_is_a_line(capsys, monkeypatch, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    path = save_tiny_model(tmp_path / "strict", tokenizer)
    status, out, notes = chat(capsys, monkeypatch, path, "--system", "Hi.", "--prompt", "The sky?", *SHORT)
    assert status == 1 and out == "" and "the chat template refuses this conversation: no system" in notes


def test_ctrl_c_at_the_prompt_does_not_leave(base, talker, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "The sky?", EOFError])

    def ask(prompt):
        given = next(typed)
        if isinstance(given, str):
            return given
        raise given

    monkeypatch.setattr("builtins.input", ask)
    talks = Conversation(talker())
    talks.is_typed = True
    assert talks.run("tiny") == 0 and talks.talker.messages[0]["content"] == "The sky?"
    assert "/quit or Ctrl-D leaves." in capsys.readouterr().err


def test_what_cannot_talk(capsys, monkeypatch, base, tmp_path):
    def error(*words):
        status, _, notes = chat(capsys, monkeypatch, *words)
        assert status == 2
        return notes

    classifier = save_tiny_classifier(tmp_path / "reward", build_tokenizer(), "qwen2", tie_word_embeddings=True)
    assert "is a classifier (Qwen2ForSequenceClassification)" in error(classifier)
    assert "MODEL_OR_ADAPTER_FOLDER is missing" in error()
    assert "there is no such folder" in error(str(tmp_path / "no" / "thing"))
    assert "base_model is for adapters" in error(base, "--base_model", base)
    assert "temperature=-1.0: expected a number from 0 on" in error(base, "--temperature", "-1")
    assert "top_p=0.0" in error(base, "--top_p", "0")
