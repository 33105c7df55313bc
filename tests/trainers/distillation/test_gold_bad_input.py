"""Each thing that GOLDTrainer cannot serve is named, with its value and a remedy, before training."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import trl_fast
from support.given_answers import conversations, save_changed
from support.training import make_trainer

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}
ULD = {"use_uld_loss": True}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lmbda": 2.0}, r"lmbda: expected a finite number in \[0, 1\], got 2.0"),
        (
            {"max_length": 64, "max_completion_length": 64},
            "max_completion_length=64 with max_length=64 leaves no token",
        ),
        ({"generation_batch_size": 3}, "generation_batch_size=3 prompts .* are not the 8 completions"),
        ({"vllm_sync_frequency": 2}, "vllm_sync_frequency=2: completions are sampled with the weights of their step"),
        (
            {"uld_token_merge_strategy": "first"},
            "uld_token_merge_strategy='first' is unknown; expected one of observed",
        ),
        (
            {"uld_hybrid_matched_weight": 1.0},
            "uld_hybrid_matched_weight=1.0 goes with uld_hybrid_unmatched_weight=None",
        ),
        ({"uld_student_temperature": 0.0}, "uld_student_temperature: expected a finite number > 0"),
        ({**ULD, "divergence": "tvd"}, "divergence='tvd' compares predictions over one vocabulary"),
        ({**ULD, "teacher_top_k": 4}, "teacher_top_k=4 compares predictions over one vocabulary"),
        ({**ULD, "uld_distillation_weight": 0.0}, "uld_distillation_weight=0 .* nothing would be learned"),
        ({**ULD, "seq_kd": True}, "seq_kd=True with use_uld_loss=True: the teacher would sample"),
    ],
)
def test_arguments(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        trl_fast.GOLDConfig(str(tmp_path), per_device_train_batch_size=8, **QUIET, **settings)
    assert "\n" not in str(error.value)


def test_callbacks_belong_to_the_trainer(tmp_path):
    with pytest.raises(TypeError, match="GOLDConfig has no field 'callbacks'; give callbacks to the trainer"):
        trl_fast.GOLDConfig(str(tmp_path), callbacks=["x"], **QUIET)


def test_what_needs_two_tokenizers_is_said(tmp_path, caplog):
    trl_fast.GOLDConfig(str(tmp_path), uld_use_hybrid_loss=True, **QUIET)
    assert "uld_use_hybrid_loss=True has no effect without use_uld_loss=True" in caplog.text


@pytest.fixture
def refused(model_path, other_teacher_path, tokenizer, tmp_path):
    def check(message, kind=ValueError, settings=None, **changes):
        arguments = {
            **{"model": model_path, "teacher_model": other_teacher_path, "train_dataset": conversations()},
            **{"processing_class": tokenizer, **changes},
        }
        with pytest.raises(kind, match=message) as error:
            make_trainer(trl_fast, tmp_path, method="GOLD", arguments=arguments, **(settings or {}))
        assert "\n" not in str(error.value)

    return check


def test_another_tokenizer_without_its_loss(refused):
    refused("its tokenizer differs from the student's|the student's head has .* tokens")


def test_rows_without_an_answer(refused):
    rows = Dataset.from_list([{"prompt": "What?"}])
    refused("no 'completion'; where completions are given", train_dataset=rows, settings=ULD)


def test_a_tokenizer_that_is_not_of_bytes(refused, model_path, tmp_path):
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), eos_token="?"
    )
    folder = save_changed(model_path, tmp_path / "words", words)
    refused(
        "use_extended_uld=True needs tokenizers of bytes, and that of teacher_model",
        teacher_model=folder,
        settings=ULD,
    )


def test_vocabularies_with_nothing_in_common(refused, model_path, tmp_path):
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"§§": 0, "??": 1}, unk_token="??")), eos_token="??"
    )
    folder = save_changed(model_path, tmp_path / "words", words)
    settings = {**ULD, "use_extended_uld": False, "uld_use_hybrid_loss": True}
    refused("uld_use_hybrid_loss=True: the teacher's vocabulary has no token", teacher_model=folder, settings=settings)


def test_a_tokenizer_that_is_not_there(refused):
    settings = {**ULD, "teacher_tokenizer_name_or_path": "/no/such/tokenizer"}
    refused("teacher_tokenizer_name_or_path: ", OSError, settings=settings)


def test_a_row_that_is_too_long_for_the_teacher(model_path, tokenizer, tmp_path):
    teacher = save_changed(model_path, tmp_path / "short", max_position_embeddings=16)
    arguments = {"model": model_path, "teacher_model": teacher, "train_dataset": conversations()}
    trainer = make_trainer(
        trl_fast,
        tmp_path,
        method="GOLD",
        arguments=arguments,
        lmbda=0.0,
        max_length=96,
        **ULD,
        **{"max_completion_length": 8},
    )
    with pytest.raises(
        ValueError, match="teacher_model: a row has .* tokens for its tokenizer, and it has 16 positions"
    ):
        trainer.train()


def test_models_that_are_loaded_are_taken(model_path, other_teacher_path, tokenizer, tmp_path):
    arguments = {
        "model": AutoModelForCausalLM.from_pretrained(model_path),
        "teacher_model": AutoModelForCausalLM.from_pretrained(other_teacher_path),
        **{"train_dataset": conversations(), "processing_class": tokenizer},
    }
    make_trainer(trl_fast, tmp_path, method="GOLD", arguments=arguments, **ULD)
