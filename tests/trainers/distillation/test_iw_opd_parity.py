"""IWOPDTrainer against TRL 1.16.0's, whose faults are mended here: loss, gradient norm and every logged metric."""

import math

import pytest
import torch
import trl.experimental.iw_opd as trl_iw_opd
import trl.generation.vllm_client
from datasets import Dataset
from peft import LoraConfig

import trl_fast
from support.rollouts import FixedEngine, FixedRollout
from support.teacher_server import teacher_server
from support.training import NOT_COMPARED, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

BASE = {"max_completion_length": 8, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "max_length": 64}
# Loss and gradients are sums over the whole step; metrics are means of micro-batches' means, which hold other rows.
OF_STEPS = {"loss", "grad_norm", "learning_rate", "epoch", "step", "on_policy_loss", "off_policy_loss"}
THEIRS = trl_iw_opd.IWOPDTrainer


@pytest.fixture(scope="module")
def server(teacher_path):
    with teacher_server(teacher_path) as served:
        yield served


def conversations(count=12):
    """Questions, without answers."""
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": "What color is " + "very " * (i % 3) + f"{i}?"}]}
            for i in range(count)
        ]
    )


def answered(count=12):
    rows = [
        [*row["messages"], {"role": "assistant", "content": f"It is blue {i * 7}" * (1 + i % 3)}]
        for i, row in enumerate(conversations(count))
    ]
    return Dataset.from_list([{"messages": row} for row in rows])


@pytest.fixture
def theirs(tokenizer, monkeypatch):
    """Gives TRL's trainer fixed completions, and divisors that count what it learns from."""
    rollout, compute_loss = FixedRollout(tokenizer), THEIRS.compute_loss

    def generate(trainer, slices, chosen):
        for place in chosen:
            given = slices[place]
            prompts, mask = given["prompts"], given["prompt_attention_mask"]
            found = rollout.completions([ids[kept.bool()].tolist() for ids, kept in zip(prompts, mask, strict=True)])
            width = max(map(len, found))
            tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in found])
            input_ids, lengths = torch.cat([prompts, tokens], dim=1), torch.tensor([len(ids) for ids in found])
            attention, labels = trainer._build_sequence_batch(input_ids, prompts.shape[1], mask.sum(dim=1), lengths)
            made = {"input_ids": input_ids, "attention_mask": attention, "labels": labels}
            trainer._buffered_inputs[place] = {**given, **made}

    def mended(trainer, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not trainer.model.training:
            return compute_loss(trainer, model, inputs, return_outputs)
        count = sum((each["labels"] != -100).sum() for each in trainer._buffered_inputs)
        loss = compute_loss(trainer, model, inputs, return_outputs, count)
        of_micro_batch = trainer.use_teacher_server and trainer.distillation_objective == "jsd"
        return loss / trainer.args.gradient_accumulation_steps if of_micro_batch else loss

    monkeypatch.setattr(THEIRS, "_generate_with_model", generate)
    monkeypatch.setattr(THEIRS, "compute_loss", mended)
    monkeypatch.setattr(trl.generation.vllm_client, "is_vllm_available", lambda: True)


@pytest.fixture
def compare(tmp_path, model_path, teacher_path, server, tokenizer, theirs):
    def run(*, served=False, peft=None, evaluates=False, ours=None, rows=conversations, **settings):
        settings = {**BASE, "gradient_accumulation_steps": 1, **settings}
        settings |= {"use_teacher_server": True, "teacher_model_server_url": server.url} if served else {}
        logs = {}
        for module in (trl_iw_opd, trl_fast):
            arguments = {"model": model_path, "train_dataset": rows(), "eval_dataset": rows(4)}
            arguments |= {} if served else {"teacher_model": teacher_path}
            arguments |= {"peft_config": LoraConfig(**peft)} if peft else {}
            own = {**settings, **(ours or {})} if module is trl_fast else settings
            arguments |= {"rollout_engine": FixedEngine(tokenizer)} if module is trl_fast else {}
            trainer = make_trainer(module, tmp_path / module.__name__, method="IWOPD", arguments=arguments, **own)
            trainer.train()
            if evaluates:
                trainer.evaluate()
            logs[module] = trainer.state.log_history
        same_where_trl_logs(logs[trl_fast], logs[trl_iw_opd], settings["gradient_accumulation_steps"] > 1)
        assert abs(logs[trl_fast][0]["loss"]) > 1e-4 and logs[trl_fast][0]["grad_norm"] > 1e-4
        return logs[trl_fast]

    return run


def same_where_trl_logs(got, expected, only_steps):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        for name, value in theirs.items():
            if any(part in name for part in NOT_COMPARED) or (only_steps and name not in OF_STEPS):
                continue
            # TRL rounds losses by kind to four digits.
            rounded = 1e-4 if name in ("on_policy_loss", "off_policy_loss") else 1e-5
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=rounded), f"{name} at step {theirs.get('step')}"


GRADIENTS = {
    "plain": {},
    "four micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "steep, warm": {"iw_opd_gamma": 2.0, "temperature": 1.6},
    "all alike": {"iw_opd_gamma": 0.0, "iw_opd_epsilon": 0.1},
    "least sum": {"iw_opd_epsilon": 5.0},
    "several completions": {"num_generations": 4, "gradient_accumulation_steps": 2},
    "served": {"served": True},
    "served, four micro-batches": {"served": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "lora": {"peft": {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}},
    "answers that are not read": {"rows": answered},
}
QUICK = ("plain", "four micro-batches")


def some(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(GRADIENTS, QUICK))
def test_policy_gradients(name, compare):
    logs = compare(**GRADIENTS[name])
    assert {f"iw_opd/{part}" for part in ("mean_advantage", "mean_weight", "max_weight")} <= logs[0].keys()


@pytest.mark.slow
def test_layouts(main_layout, compare):
    compare(ours={"batch_layout": main_layout})


SAMPLED, GIVEN = {"distillation_objective": "jsd"}, {"distillation_objective": "jsd", "lmbda": 0.0, "rows": answered}
DIVERGENCES = {
    "sampled token": {**SAMPLED},
    "student's likeliest token": {**SAMPLED, "reverse_kl_top_1_mode": "argmax"},
    "student's likeliest tokens": {**SAMPLED, "loss_top_k": 5},
    "teacher's likeliest tokens": {**SAMPLED, "beta": 0.0, "loss_top_k": 5, "loss_add_tail": False},
    "all": {**SAMPLED, "beta": 0.3, "loss_top_k": 0},
    "given": {**GIVEN, "beta": 0.5, "loss_top_k": 0, "evaluates": True},
    "served, forward": {**SAMPLED, "served": True, "beta": 0.0, "loss_top_k": 5},
    "served, mixed": {**SAMPLED, "served": True, "beta": 0.5},
}


@pytest.mark.parametrize("name", some(DIVERGENCES, ("sampled token", "given")))
def test_divergences(name, compare):
    compare(**DIVERGENCES[name])


@pytest.mark.slow
def test_trl_divides_by_what_it_does_not_learn_from(
    model_path, teacher_path, tokenizer, tmp_path, theirs, monkeypatch
):
    """Its divisor are the dataset's answers, of which prompts alone have none; here it is the sampled tokens."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    compute_loss = IWOPDTrainer.compute_loss.__closure__
    original = next(
        cell.cell_contents for cell in compute_loss if getattr(cell.cell_contents, "__name__", "") == "compute_loss"
    )
    monkeypatch.setattr(IWOPDTrainer, "compute_loss", original)
    given = {"model": model_path, "teacher_model": teacher_path, "train_dataset": conversations()}
    settings = {**BASE, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = make_trainer(trl_iw_opd, tmp_path / "trl", method="IWOPD", arguments=given, **settings)
    trainer.train()
    assert not math.isfinite(trainer.state.log_history[0]["grad_norm"])
    given["rollout_engine"] = FixedEngine(tokenizer)
    trainer = make_trainer(trl_fast, tmp_path / "ours", method="IWOPD", arguments=given, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 1e-4
