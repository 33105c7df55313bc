"""DistillationTrainer and GKDTrainer as a person uses them: mixtures, teachers, tools, resuming, evaluation."""

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_fast
import trl_fast.data.packing as packing
from support.models import save_tiny_model, tiny_model
from support.resuming import assert_resumes
from support.rollouts import FixedEngine, FixedRollout, color_prompts
from support.tokenizer import build_tokenizer
from support.tools import TOOLS, ToolPolicy, questions, tool_tokenizer
from support.training import make_trainer
from trl_fast.data.segments import segments_of
from trl_fast.modeling.loading import base_model


@pytest.fixture
def make(model_path, teacher_path, tokenizer, tmp_path):
    def trainer(folder=None, *, method="Distillation", **given):
        names = ("model", "teacher_model", "train_dataset", "eval_dataset", "peft_config", "rollout_func", "tools")
        names += ("rollout_engine", "processing_class")
        arguments = {"model": model_path, "teacher_model": teacher_path, "train_dataset": color_prompts()}
        arguments |= {name: given.pop(name) for name in names if name in given}
        if not {"rollout_func", "rollout_engine"} & arguments.keys():
            arguments["rollout_engine"] = FixedEngine(tokenizer)
        settings = {"max_completion_length": 8} if method == "Distillation" else {"max_new_tokens": 8}
        return make_trainer(
            trl_fast, folder or tmp_path, method=method, arguments=arguments, **{**settings, "max_steps": 2, **given}
        )

    return trainer


def answers(count=16):
    return Dataset.from_list([{**row, "completion": f" It is {row['shade'] * 7}"} for row in color_prompts(count)])


def test_the_divergence_of_a_given_text_falls(make):
    settings = {"lmbda": 0.0, "beta": 0.0, "max_steps": 12, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    trainer = make(train_dataset=answers(), eval_dataset=answers(4), **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_a_mixture_has_the_share_that_was_asked_for(make, monkeypatch):
    trainer = make(train_dataset=answers(), lmbda=0.5, max_steps=8, gradient_accumulation_steps=4)
    asked = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda ids, settings: asked.append(len(ids)) or generate(ids, settings)
    trainer.train()
    # Whole micro-batches of four, of 32 in all.
    assert all(count % 4 == 0 for count in asked) and 8 <= sum(asked) // 4 <= 24
    again = make(train_dataset=answers(), lmbda=0.5, max_steps=8, gradient_accumulation_steps=4)
    drawn = [again.mixture.drawn(step) for step in range(8)]
    assert sum(map(sum, drawn)) == sum(asked) // 4
    assert drawn == [again.mixture.drawn(step) for step in range(8)]


def test_the_teacher_samples_what_the_student_does_not(make, teacher_path):
    trainer = make(lmbda=0.0, seq_kd=True, generation_kwargs={"do_sample": False}, max_completion_length=4)
    samples = trainer.mixture.samples([*trainer.train_dataset.select(range(2))], [False, False])
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
    for prompt, completion in zip(samples.prompt_ids, samples.completion_ids, strict=True):
        found = teacher.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=4, do_sample=False
        )
        expected = found[0, len(prompt) :].tolist()
        assert completion == expected[: len(completion)] and len(completion) > 0


def test_several_completions_of_a_prompt_share_it(make, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    trainer = make(num_generations=4)
    row = trainer.train_dataset[0]
    update = trainer._update(trainer.mixture.samples([row] * 4, [True] * 4), 1.0)
    assert len([segment for segment in segments_of(update.batch.tree_lengths) if segment.parent is None]) == 1
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def losses(trainer):
    trainer.train()
    return [log[name] for log in trainer.state.log_history if "loss" in log for name in ("loss", "grad_norm")]


@pytest.mark.parametrize("beta", [0.5, *(pytest.param(beta, marks=pytest.mark.slow) for beta in (0.0, 1.0))])
def test_models_that_give_their_own_logits_are_trained_alike(beta, make, tokenizer):
    fused, own = (make(rollout_engine=FixedEngine(tokenizer), beta=beta) for _ in range(2))
    for model in (own.model, own.teacher_model):
        model.trl_fast_fused_head = False
    assert losses(own) == pytest.approx(losses(fused), rel=1e-4)


def test_a_head_that_is_not_understood_is_said(make, caplog, monkeypatch, wider_teacher_path):
    import trl_fast.modeling.scoring as scoring

    def not_understood(model, layout, *args, **kwargs):
        if base_model(model).config.hidden_size == 48:
            scoring.give_up_fused_head(base_model(model), "its logits are its own")

    import trl_fast.trainers.distillation.trainer as module

    monkeypatch.setattr(module, "choose_layout", not_understood)
    monkeypatch.setattr(module, "same_family", lambda one, other: False)
    trainer = make(teacher_model=wider_teacher_path)
    assert not trainer.model.trl_fast_fused_head and not trainer.teacher_model.trl_fast_fused_head
    assert "LlamaForCausalLM: the head of LlamaForCausalLM, which it is compared with, is not read" in caplog.text


def test_heads_padded_to_different_sizes(make, teacher_path, tmp_path, tokenizer):
    """The student's padding has no share: it gets no gradient, and the loss is that of equal heads."""
    padded = AutoModelForCausalLM.from_pretrained(teacher_path)
    size = padded.config.vocab_size
    padded.resize_token_embeddings(size + 8)
    with torch.no_grad():
        padded.get_output_embeddings().weight[size:] = 3.0
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    whole, cut = make(beta=0.5), make(beta=0.5, teacher_model=str(tmp_path / "padded"))
    assert (whole.vocab_size, cut.vocab_size) == (None, size)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("samples", ["student", "teacher"])
def test_no_token_is_sampled_that_only_one_head_has(samples, make, model_path, teacher_path, tmp_path, tokenizer):
    """The other model would have no embedding of it."""
    padded = AutoModelForCausalLM.from_pretrained(teacher_path)
    size = padded.config.vocab_size
    padded.resize_token_embeddings(size + 200, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    student, teacher = str(tmp_path / "padded"), model_path
    if samples == "teacher":
        student, teacher = teacher, student
    given = {"lmbda": 0.0, "seq_kd": True} if samples == "teacher" else {}
    trainer = make(model=student, teacher_model=teacher, rollout_engine=None, temperature=50.0, max_steps=1, **given)
    trainer.train()
    found = trainer.mixture.samples([*trainer.train_dataset], [samples == "student"] * len(trainer.train_dataset))
    assert max(map(max, found.completion_ids)) < size


@pytest.mark.parametrize("kind", ["skewed_forward_kl", "skewed_reverse_kl", "tvd"])
def test_other_divergences_and_likeliest_tokens(kind, make):
    for settings in ({}, {"teacher_top_k": 16}):
        found = losses(make(divergence=kind, beta=0.1, max_steps=1, **settings))
        assert min(found) > 0


def test_all_of_the_vocabulary_is_as_none(make, model_path):
    size = AutoModelForCausalLM.from_pretrained(model_path).config.vocab_size
    assert losses(make(beta=0.5, teacher_top_k=size)) == pytest.approx(losses(make(beta=0.5)), rel=1e-4)


@pytest.mark.parametrize("peft", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resuming(peft, make, tmp_path):
    def trainer(folder, **changes):
        adapter = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")} if peft else {}
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "lmbda": 0.5, **adapter, **changes}
        return make(folder, train_dataset=answers(), rollout_engine=None, **settings)

    assert_resumes(trainer, tmp_path / "run", (1, 2))


def test_the_trained_student_is_saved_and_the_teacher_is_not(make, tmp_path):
    trainer = make()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, own), kept in zip(trainer.model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(own, kept), name
    assert not any(weight.requires_grad for weight in trainer.teacher_model.parameters())
    assert trainer.teacher_model.training is False


def test_the_table_of_completions(make, tmp_path, capsys):
    trainer = make(log_completions=True, num_completions_to_print=1)
    trainer.train()
    frame = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert list(frame) == ["step", "prompt", "completion"] and len(frame) == 8
    assert "completions at step 2" in capsys.readouterr().out


def test_streams(make):
    rows = list(answers(16))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = make(train_dataset=stream, eval_dataset=stream.take(4), lmbda=0.5, per_device_eval_batch_size=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_what_may_be_changed_in_training(make):
    trainer = make()
    trainer.beta = 0.25
    assert trainer.args.beta == trainer.divergence_settings.beta == 0.25
    with pytest.raises(ValueError, match="beta: expected"):
        trainer.beta = 2.0
    assert trainer.beta == 0.25 and trainer.teacher_model is trainer.ref_model


def test_tools(teacher_path, tmp_path):
    """Tokens that tools wrote have no weight in the loss; calls are counted."""
    tokenizer = tool_tokenizer()
    model = save_tiny_model(tmp_path / "student", tokenizer)
    teacher = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(1.1)
    teacher.config._name_or_path = ""
    arguments = {
        "model": model,
        "teacher_model": teacher,
        "train_dataset": questions(),
        "tools": TOOLS,
        "processing_class": tokenizer,
        "rollout_engine": ToolPolicy(tokenizer),
    }
    settings = {"max_completion_length": 90, "max_steps": 1, "gradient_accumulation_steps": 1}
    trainer = make_trainer(trl_fast, tmp_path / "run", method="Distillation", arguments=arguments, **settings)
    rows = [trainer.train_dataset[index] for index in range(4)]
    update = trainer._prepare_inputs(rows)
    assert 0 < (update.weights == 0).sum() < len(update.weights)
    trainer.generation.slices = None
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["tools/call_frequency"] > 0 and log["loss"] > 0


def test_gkd_reads_conversations_and_evaluates_on_them(make):
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(16)
    ]
    data = Dataset.from_list(rows)
    trainer = make(method="GKD", train_dataset=data, eval_dataset=data.select(range(4)), lmbda=0.5)
    trainer.train()
    first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == second > 0
    assert list(trainer._get_eval_sampler(trainer.eval_dataset)) == [0, 1, 2, 3]
    assert trainer.divergence_settings.temperature == 1.0 and trainer.args.sampling_settings().temperature == 0.9
    assert trainer.lmbda == 0.5 and trainer.seq_kd is False


def test_a_rollout_func_with_a_mask(make):
    trainer = make(rollout_func=FixedRollout(build_tokenizer(), with_mask=True))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_a_teacher_with_an_adapter(make, teacher_path):
    from peft import get_peft_model

    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
    adapted = get_peft_model(teacher, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.ones_like(weight), alpha=0.05)
    plain, with_adapter = losses(make()), losses(make(teacher_model=adapted))
    assert abs(plain[0] - with_adapter[0]) > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        pytest.param({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, marks=pytest.mark.slow),
        pytest.param({"model_init_kwargs": {"dtype": "bfloat16"}}, marks=pytest.mark.slow),
    ],
    ids=["autocast", "teacher", "student"],
)
def test_dtypes(settings, make):
    """The divergence is that of float32 but for rounding."""
    exact, rounded = losses(make(beta=0.5, max_steps=1)), losses(make(beta=0.5, max_steps=1, **settings))
    assert rounded == pytest.approx(exact, rel=0.05)


def test_a_mixture_of_experts_keeps_its_router_loss(make, tmp_path, tokenizer):
    student, teacher = tiny_model("mixtral"), tiny_model("mixtral")
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(1.3)
    teacher.config._name_or_path = ""
    given = {"model": student, "teacher_model": teacher, "processing_class": tokenizer, "max_steps": 1}
    trainer = make(**given, router_aux_loss_coef=0.5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["aux_loss"] > 0 and log["loss"] > 0.4 * log["aux_loss"]
