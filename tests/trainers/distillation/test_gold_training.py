"""GOLDTrainer as a person uses it: mixtures, other tokenizers, memory, resuming, evaluation."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_fast
import trl_fast.modeling.memory_budgets as memory_budgets
import trl_fast.ops.linear_distance as linear_distance
from support.given_answers import conversations, texts
from support.resuming import assert_resumes
from support.rollouts import FixedEngine
from support.training import make_trainer

ULD = {"use_uld_loss": True, "uld_token_merge_strategy": "bayesian", "learning_rate": 1e-2}
HYBRID = {**ULD, "uld_use_hybrid_loss": True}


@pytest.fixture
def make(model_path, teacher_path, other_teacher_path, tokenizer, tmp_path):
    def trainer(folder=None, **given):
        names = ("model", "teacher_model", "train_dataset", "eval_dataset", "peft_config", "rollout_engine")
        teacher = other_teacher_path if given.get("use_uld_loss") else teacher_path
        arguments = {"model": model_path, "teacher_model": teacher, "train_dataset": conversations()}
        arguments |= {name: given.pop(name) for name in names if name in given}
        arguments.setdefault("rollout_engine", FixedEngine(tokenizer))
        settings = {"max_completion_length": 8, "max_length": 96, "lmbda": 0.0, "max_steps": 2, **given}
        return make_trainer(trl_fast, folder or tmp_path, method="GOLD", arguments=arguments, **settings)

    return trainer


def numbers(trainer, *names):
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [log[name] for log in logs for name in ("loss", "grad_norm", *names)]


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {**HYBRID, "uld_crossentropy_weight": 0.3}],
    ids=["jsd", "hybrid"],
)
def test_a_step_is_the_same_in_one_micro_batch_and_in_several(settings, make):
    """TRL's is as many times too small, or with use_uld_loss too large."""
    names = ("off_policy_loss", *(("matched_loss", "unmatched_loss") if settings else ()))
    one = numbers(make(per_device_train_batch_size=4, gradient_accumulation_steps=1, **settings), *names)
    four = numbers(make(per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings), *names)
    assert four == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), ULD], ids=["jsd", "uld"])
def test_a_mixture_tells_the_losses_of_both_kinds(settings, make):
    trainer = make(lmbda=0.5, max_steps=3, gradient_accumulation_steps=4, logging_steps=3, **settings)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["on_policy_loss"] > 0 and logs["off_policy_loss"] > 0
    share = sum(sum(trainer.mixture.drawn(step)) for step in range(3)) / 12
    mean = share * logs["on_policy_loss"] + (1 - share) * logs["off_policy_loss"]
    # Of tokens, in the first case, which micro-batches have different numbers of.
    assert mean == pytest.approx(logs["loss"], rel=1e-4 if settings else 0.2)


def test_models_that_give_their_own_logits_are_trained_alike(make):
    settings = {**HYBRID, "uld_crossentropy_weight": 0.3, "uld_student_temperature": 0.8}
    fused, own = (make(**settings) for _ in range(2))
    for model in (own.model, own.teacher_model):
        model.trl_fast_fused_head = False
    assert numbers(own) == pytest.approx(numbers(fused), rel=1e-3)


def test_tiles_of_rows_are_bounded_by_the_workspace(make, monkeypatch):
    """Probabilities exist for as many rows as the workspace holds, and the loss is the same."""
    heights, compare = [], linear_distance._compare_rows

    def counted(logits, others, *given, **options):
        heights.append(len(logits))
        return compare(logits, others, *given, **options)

    monkeypatch.setattr(linear_distance, "_compare_rows", counted)
    row = 340 * 44 + 300 * 36
    whole = numbers(make(**ULD))
    tallest, heights[:] = max(heights), []
    tiles = numbers(make(head_workspace_bytes=3 * row, **ULD))
    assert 0 < max(heights) <= 3 < tallest and tiles == pytest.approx(whole, rel=1e-4)


def test_a_workspace_that_is_not_given_holds_some_rows(make, monkeypatch):
    """Of a head with many tokens, few logits are more than what is taken for as few rows by other methods."""
    expected = numbers(make(**ULD))
    monkeypatch.setattr(memory_budgets, "_ROW_BYTES_ON_CPU", 1)
    monkeypatch.setattr(memory_budgets, "_LEAST_ROWS", 1)
    assert numbers(make(**ULD)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layouts_give_the_same_numbers(layout, make):
    expected = numbers(make(**ULD))
    assert numbers(make(batch_layout=layout, **ULD)) == pytest.approx(expected, rel=2e-3)


def test_a_prompt_whose_completion_is_sampled_keeps_its_end(make, tokenizer):
    trainer = make(lmbda=1.0, max_length=40, train_dataset=texts(), max_completion_length=36)
    asked = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda ids, settings: asked.extend(ids) or generate(ids, settings)
    trainer.train()
    assert {len(ids) for ids in asked} == {4}
    assert all(tokenizer.decode(ids).endswith("?") for ids in asked)


def test_a_sampled_end_token_is_none_of_the_text(make, tokenizer):
    trainer = make(**ULD)
    ids = tokenizer("It is blue", add_special_tokens=False)["input_ids"]
    told = trainer.spans.interpreter.tell(ids, [*ids, tokenizer.eos_token_id])
    teacher = trainer.teacher_tokenizer
    assert teacher.decode(told.teacher.ids) == "It is blue</s>"
    assert teacher.decode(told.teacher_prompt_ids) == "<s>It is blue"
    assert told.student.ends[-2:] == [10, 10] and told.teacher.ends[-2:] == [10, 10]
    cut_off = trainer.spans.interpreter.tell(ids, ids)
    assert cut_off.student.ends[-1] == 10 and cut_off.student.compared == len(ids) - 1


def test_a_first_token_that_is_written_already_is_not_read_twice(make, tokenizer):
    trainer = make(**ULD)
    prompt = tokenizer("<s>Hi", add_special_tokens=False)["input_ids"]
    told = trainer.spans.interpreter.tell(prompt, prompt)
    assert trainer.teacher_tokenizer.decode(told.teacher_prompt_ids) == "<s>Hi"


def test_steps_before_a_row_that_is_too_long_for_the_teacher_are_saved(make, tmp_path):
    """Which rows are, is known when their completions are; other processes fail with the one that has it."""
    rows = Dataset.from_list([{"prompt": "Hi", "completion": "is " * count} for count in (10, 60)])
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "shuffle_dataset": False}
    trainer = make(train_dataset=rows, save_strategy="steps", save_steps=100, **settings, **ULD)
    trainer.spans.interpreter._positions = (None, 50)
    with pytest.raises(ValueError, match="and it has 50 positions"):
        trainer.train()
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.parametrize("positions", [(4, None), (None, 5)], ids=["student", "teacher"])
def test_the_place_behind_the_last_token_needs_a_position(positions, make, tokenizer):
    """The teacher's row begins with a token of its own."""
    compared = {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False}
    for settings, refused in (({}, True), ({"uld_token_merge_strategy": "bayesian"}, False)):
        trainer = make(use_uld_loss=True, **compared, **settings)
        interpreter = trainer.spans.interpreter
        interpreter._positions = positions
        row = tokenizer("a", add_special_tokens=False)["input_ids"] * 2, [*tokenizer("a")["input_ids"], 1]
        if refused:
            with pytest.raises(ValueError, match="model: a row has . tokens .* it has . positions"):
                interpreter.tell(*row)
        else:
            interpreter.tell(*row)


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint(make, tmp_path):
    settings = {"lmbda": 0.5, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "rollout_engine": None, **ULD}
    assert_resumes(lambda folder, **given: make(folder, **{**settings, **given}), tmp_path, (1,))


def test_a_table_of_completions_is_shown_at_some_steps(make, tmp_path):
    trainer = make(lmbda=1.0, max_steps=4, log_completions=True, log_completions_steps=2)
    trainer.train()
    shown = sorted(path.stem.split("_")[-1].lstrip("0") for path in (tmp_path / "completions").iterdir())
    assert shown == ["2", "4"]


def test_a_teacher_that_is_loaded_needs_a_tokenizers_name(make, other_teacher_path):
    teacher = AutoModelForCausalLM.from_pretrained(other_teacher_path)
    teacher.config._name_or_path = ""
    with pytest.raises(ValueError, match="teacher_tokenizer_name_or_path is missing"):
        make(teacher_model=teacher, **ULD)
    trainer = make(teacher_model=teacher, teacher_tokenizer_name_or_path=other_teacher_path, **ULD)
    assert len(trainer.teacher_tokenizer) == len(AutoTokenizer.from_pretrained(other_teacher_path))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, ULD, HYBRID], ids=["jsd", "uld", "hybrid"])
def test_the_distance_of_given_texts_falls(settings, make):
    settings = {**settings, "max_steps": 40, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    trainer = make(eval_dataset=conversations(4), **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.85 * before


@pytest.mark.slow
def test_own_completions_with_an_adapter(make):
    peft = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make(lmbda=1.0, num_generations=4, peft_config=peft, max_steps=3, **HYBRID)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)
