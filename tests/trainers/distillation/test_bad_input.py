"""Each thing that cannot be distilled is named, with its value and a remedy, before training."""

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import trl_fast
from support.rollouts import color_prompts
from support.tokenizer import build_tokenizer
from support.training import make_trainer

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 1.5}, r"beta: expected a finite number in \[0, 1\], got 1.5"),
        ({"beta": -0.1}, r"beta: expected a finite number in \[0, 1\], got -0.1"),
        ({"lmbda": 2.0}, r"lmbda: expected a finite number in \[0, 1\], got 2.0"),
        ({"divergence": "jds"}, "divergence='jds' is unknown; expected one of jsd.*did you mean 'jsd'"),
        ({"divergence": "skewed_forward_kl"}, "beta=1 makes skewed_forward_kl zero"),
        ({"teacher_top_k": 0}, "teacher_top_k: expected an integer >= 1"),
        ({"seq_kd": True}, "seq_kd=True with lmbda=1"),
        ({"num_generations": 3}, "num_generations=3 does not divide the 8 completions.*num_generations=1, 2, 4 or 8"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True would change"),
    ],
)
def test_arguments(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trl_fast.DistillationConfig(str(tmp_path), **QUIET, **settings)


def test_two_names_of_a_length(tmp_path):
    with pytest.raises(ValueError, match="max_completion_length=64: GKDConfig has max_new_tokens=128"):
        trl_fast.GKDConfig(str(tmp_path), max_completion_length=64, **QUIET)


@pytest.fixture
def refused(model_path, teacher_path, tmp_path):
    def check(message, kind=ValueError, method="Distillation", settings=None, **changes):
        arguments = {"model": model_path, "teacher_model": teacher_path, "train_dataset": color_prompts(), **changes}
        with pytest.raises(kind, match=message) as error:
            make_trainer(trl_fast, tmp_path, method=method, arguments=arguments, **(settings or {}))
        assert "\n" not in str(error.value)

    return check


def changed_teacher(folder, path, size=None, tokenizer=None):
    """Saves the model at `path`, with another vocabulary size or tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path)
    if size is not None:
        model.resize_token_embeddings(size)
    model.save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return str(folder)


def test_no_teacher(refused):
    refused("teacher_model is missing", teacher_model=None)
    refused("teacher_model: expected a hub name, .* got int", TypeError, teacher_model=3)
    refused("teacher_model: .*cannot be loaded", OSError, teacher_model="/no/such/teacher")


def test_the_student_as_its_teacher(refused, model_path):
    refused("is the model that is trained: its divergence from itself is 0", teacher_model=model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    refused("is the model that is trained", model=model, teacher_model=model)
    sharing = AutoModelForCausalLM.from_pretrained(model_path)
    sharing.model.embed_tokens = model.model.embed_tokens
    refused("made of the weights of the trained model", model=model, teacher_model=sharing)


def test_arguments_of_a_teacher_that_is_loaded(refused, teacher_path):
    model = AutoModelForCausalLM.from_pretrained(teacher_path)
    settings = {"teacher_model_init_kwargs": {"dtype": "float32"}}
    refused("teacher_model_init_kwargs needs a teacher_model given by name", teacher_model=model, settings=settings)


def test_virtual_tokens_of_a_teacher(refused, teacher_path):
    model = AutoModelForCausalLM.from_pretrained(teacher_path)
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    refused("teacher_model: its adapter puts tokens of its own before each row", teacher_model=prompted)


def test_another_vocabulary(refused, teacher_path, tmp_path):
    smaller = changed_teacher(tmp_path / "smaller", teacher_path, size=len(build_tokenizer()) - 3)
    refused(r"the student's head has \d+ tokens, .* but a tokenizer has the token id", teacher_model=smaller)
    unnamed = AutoModelForCausalLM.from_pretrained(teacher_path)
    unnamed.resize_token_embeddings(unnamed.config.vocab_size + 8)
    unnamed.config._name_or_path = ""
    refused("the teacher has no tokenizer here which would tell", teacher_model=unnamed)


def test_another_tokenizer(refused, teacher_path, tmp_path):
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    first, second = (next(token for token, index in vocabulary.items() if index == wanted) for wanted in (20, 21))
    state = tokenizer.backend_tokenizer.to_str()
    swapped = (
        state.replace(f'"{first}":20', '"\x00":0')
        .replace(f'"{second}":21', f'"{second}":20')
        .replace('"\x00":0', f'"{first}":21')
    )
    assert swapped != state
    other = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(swapped))
    folder = changed_teacher(tmp_path / "other", teacher_path, tokenizer=other)
    refused(f"its tokenizer differs from the student's: token 20 is {second!r}", teacher_model=folder)


def test_more_tokens_than_there_are(refused):
    refused(r"teacher_top_k=100000 is more than the \d+ tokens", settings={"teacher_top_k": 100_000})


ANSWERED = {"prompt": "What?", "completion": " This."}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "What?"}], "has the columns .* but no 'completion'; where completions are given"),
        ([{**ANSWERED, "completion": ""}], "row 0, column 'completion': the completion is empty"),
        ([{**ANSWERED, "completion": [{"role": "assistant", "content": "x"}]}], "expected both to be text"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}], "row 0, column 'messages': .* does not end with an"),
    ],
)
def test_rows_of_given_completions(rows, message, refused):
    refused(message, train_dataset=Dataset.from_list(rows), settings={"lmbda": 0.5})


def test_a_completion_without_room(refused):
    long = Dataset.from_list([{"prompt": "What?", "completion": " This." * 50}])
    settings = {"lmbda": 0.0, "max_length": 16}
    refused("row 0: the prompt has no token left .* within max_length=16", train_dataset=long, settings=settings)


def test_what_gkd_cannot_compute(refused):
    refused("compute_metrics: no logits are kept", method="GKD", compute_metrics=lambda found: {})
    refused("model is missing", method="GKD", model=None)


def test_weights_on_different_devices_are_said(model_path, teacher_path):
    from trl_fast.modeling.distillation import DivergenceSettings, ReadDivergence, TeacherStates
    from trl_fast.modeling.lm_head import HeadParameters

    model = AutoModelForCausalLM.from_pretrained(model_path)
    reading = ReadDivergence(TeacherStates(model, torch.zeros(1, 4)), torch.ones(1), DivergenceSettings())
    own, other = torch.zeros(3, 4), torch.zeros(3, 4, device="meta")
    with pytest.raises(ValueError, match="teacher_model: its head is on meta, the student's on cpu"):
        reading._compared(
            model, torch.zeros(1, 4), HeadParameters(own, None), own, HeadParameters(other, None), reading.head
        )
