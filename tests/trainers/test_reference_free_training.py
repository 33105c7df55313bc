"""ORPO, CPO and TPO as trainers: TRL's fields and attributes; batches, saving, resuming, evaluating; bad input."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

import trl_fast
from support.reference_free import color_triples, trls
from support.training import assert_same_logs, color_pairs, make_trainer
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data.dict_batch import DictBatch
from trl_fast.trainers.base.config import OTHER_DEFAULTS

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
METHODS = ("ORPO", "CPO", "TPO")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.fixture
def build(model_path, tmp_path):
    def build(method, arguments=None, *, module=trl_fast, folder="run", **settings):
        rows = color_triples if method == "TPO" else color_pairs
        given = {"model": model_path, "train_dataset": rows(12), **(arguments or {})}
        return make_trainer(module, tmp_path / folder, method=method, arguments=given, **settings)

    return build


# ---- configs


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_trl_is_there_with_its_default(method, tmp_path):
    theirs = getattr(trls(method), f"{method}Config")(str(tmp_path), **CPU)
    ours = getattr(trl_fast, f"{method}Config")(str(tmp_path), **CPU)
    for field in dataclasses.fields(theirs):
        if field.init and field.name not in OTHER_DEFAULTS:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_trls_own_config_is_accepted(build, tmp_path):
    config = trls("CPO").CPOConfig(str(tmp_path), **CPU, loss_type="alphapo", alpha=0.2, max_length=77)
    args = trl_fast.CPOTrainer(
        build("CPO").model, args=config, train_dataset=color_pairs(4), processing_class=build("CPO").processing_class
    ).args
    assert isinstance(args, trl_fast.CPOConfig)
    assert (args.loss_type, args.cpo_alpha, args.alpha, args.max_length) == ("simpo", 0.0, 0.2, 77)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("CPO", {"loss_type": "kto_pair"}, "loss_type='kto_pair'.*use KTOTrainer"),
        ("CPO", {"loss_type": "simp"}, "loss_type='simp' is unknown.*did you mean 'simpo'"),
        ("TPO", {"loss_type": "simpo"}, "loss_type='simpo' is unknown; expected one of sigmoid, hinge, ipo, tpo-l"),
        ("CPO", {"loss_type": "ipo", "beta": 0.0}, "beta=0"),
        ("ORPO", {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ("ORPO", {"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle'"),
        ("ORPO", {"max_completion_length": 0}, "max_completion_length: .* got 0"),
        ("TPO", {"tpo_alpha": -1.0}, "tpo_alpha: .* got -1.0"),
    ],
)
def test_values_that_are_refused(method, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        getattr(trl_fast, f"{method}Config")(str(tmp_path), **CPU, **settings)


def test_older_names_give_one_line_each(tmp_path, caplog):
    with pytest.warns(FutureWarning, match="ORPOConfig: `max_prompt_length` is a name of an older TRL") as record:
        trl_fast.ORPOConfig(str(tmp_path), **CPU, max_prompt_length=8, generate_during_eval=True)
    assert sum("older TRL" in str(warning.message) for warning in record) == 1
    assert "generate_during_eval=True has no effect" in caplog.text


# ---- trainers


@pytest.mark.parametrize("method", METHODS)
def test_each_attribute_of_trls_trainer_is_here(method, build):
    theirs, ours = build(method, module=trls(method), folder="trl"), build(method)
    names = {name for name in {*dir(theirs), *vars(theirs)} if not name.startswith("__")}
    missing = {name for name in names if not hasattr(ours, name)}
    assert missing <= {
        *("_name", "_paper", "_tag_names", "_template_file", "_tp_size", "_stored_metrics", "use_dpo_data_collator"),
        *("_peft_has_been_casted_to_bf16", "_send_telemetry", "maybe_activation_offload_context"),
        *({"tokenize_row", "build_tokenized_answer", *type(ours).uncalled_hooks}),
    }
    plain = (bool, int, float, str, type(None))
    for name in (
        "beta",
        "label_smoothing",
        "loss_type",
        "cpo_alpha",
        "alpha",
        "tpo_alpha",
        "max_length",
        "pad_token_id",
    ):
        if isinstance(getattr(theirs, name, None), plain) and hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name), name


def test_settings_count_from_the_next_step_on(build):
    trainer = build("CPO")
    trainer.loss_type, trainer.cpo_alpha, trainer.beta = "simpo", 0.0, 0.7
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["nll_loss"] == 0
    assert log["rewards/chosen"] == pytest.approx(0.7 * log["logps/chosen"], rel=1e-5)
    with pytest.raises(ValueError, match="loss_type='simp' is unknown"):
        trainer.loss_type = "simp"


def test_a_gold_completion_that_was_not_read_cannot_be_learned_later(build):
    trainer = build("TPO", tpo_alpha=0.0)
    assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 2 * 4
    with pytest.raises(ValueError, match="tpo_alpha=1.0: batches are made without gold completions"):
        trainer.tpo_alpha = 1.0
    both = build("TPO")
    both.tpo_alpha = 0.0
    both.train()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_is_read_gives_the_same_loss(method, build):
    """A hook reads padded rows, scored in another layout, and what it changes counts."""
    trainer = build(method)
    batch = next(iter(trainer.get_train_dataloader()))
    assert isinstance(batch, DictBatch)
    loss = trainer.compute_loss(trainer.model, batch)
    entries = dict(batch.items())
    rows = 3 if method == "TPO" else 2
    assert entries["input_ids"].shape[0] == rows * 4 and set(entries) == {
        "input_ids",
        "attention_mask",
        "completion_mask",
    }
    torch.testing.assert_close(trainer.compute_loss(trainer.model, entries), loss, rtol=1e-5, atol=1e-6)
    entries["completion_mask"] = entries["completion_mask"].clone()
    entries["completion_mask"][0, entries["completion_mask"][0].nonzero()[-1]] = 0
    assert not torch.equal(trainer.compute_loss(trainer.model, entries), loss)


@pytest.mark.parametrize("method", ["ORPO", pytest.param("TPO", marks=pytest.mark.slow)])
@pytest.mark.parametrize("peft", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole model", "LoRA"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(method, peft, build):
    class PullThePlug(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def run(folder, *callbacks, **settings):
        arguments = {"peft_config": LoraConfig(**LORA)} if peft else {}
        shared = {"max_steps": 4, "gradient_accumulation_steps": 1}
        return build(method, {**arguments, "callbacks": [*callbacks]}, folder=folder, **shared, **settings)

    whole = run("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run("run", PullThePlug(), save_strategy="steps", save_steps=2).train()
    resumed = run("run", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    logs = [
        [dict(sorted(log.items())) for log in each.state.log_history if "loss" in log] for each in (resumed, whole)
    ]
    assert_same_logs(*logs, rel=1e-6, abs=1e-7)
    for (name, got), (_, wanted) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name


def test_what_is_saved_loads_and_evaluates(build, model_path, tmp_path):
    trainer = build("CPO", {"peft_config": LoraConfig(**LORA), "eval_dataset": {"few": color_pairs(3)}}, max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"), tmp_path / "run"
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
    again = trainer.evaluate()
    assert again["eval_few_loss"] == trainer.evaluate(color_pairs(3))["eval_loss"]
    logged = {name for log in trainer.state.log_history for name in log}
    assert {"eval_few_loss", "eval_nll_loss", "eval_rewards/margins"} <= logged


# ---- bad input


def test_bad_rows_are_named(build):
    with pytest.raises(ValueError, match="The train dataset has the columns.*'chosen', 'rejected' and 'reference'"):
        build("TPO", {"train_dataset": color_pairs(4)})
    with pytest.raises(ValueError, match="expected 'chosen' and 'rejected' \\(with or without 'prompt'\\)"):
        build("CPO", {"train_dataset": Dataset.from_list([{"prompt": "a", "completion": "b"}])})
    with pytest.raises(ValueError, match="row 1, column 'reference'.*empty"):
        rows = [{**ROW, "reference": " d"}, {**ROW, "reference": ""}]
        build("TPO", {"train_dataset": Dataset.from_list(rows)})
    with pytest.raises(ValueError, match="row 0: .*'reference' is messages"):
        rows = [{**ROW, "reference": [{"role": "assistant", "content": "d"}]}]
        build("TPO", {"train_dataset": Dataset.from_list(rows)})
    with pytest.raises(ValueError, match="row 0, column 'reference': it does not begin with the prompt"):
        rows = [{"chosen": "so far: b", "rejected": "so far: c", "reference": "d"}]
        build("TPO", {"train_dataset": Dataset.from_list(rows)})
    with pytest.raises(ValueError, match="column 'reference_ids': the completion has no tokens"):
        rows = [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "reference_ids": []}]
        build("TPO", {"train_dataset": Dataset.from_list(rows)})
    with pytest.raises(ValueError, match="(?s)reference_ids.*9999"):
        rows = [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "reference_ids": [9999]}]
        build("TPO", {"train_dataset": Dataset.from_list(rows)})


def test_bad_arguments_are_named(build):
    with pytest.raises(ValueError, match="model_init: .*give model=model_init"):
        build("ORPO", {"model_init": lambda: None})
    with pytest.raises(TypeError, match="ORPOTrainer has no argument 'ref_model'"):
        build("ORPO", {"ref_model": None})
    with pytest.raises(ValueError, match="balance_batches='step' would change the loss: the likelihood term"):
        build("CPO", balance_batches="step")
    assert build("CPO", cpo_alpha=0.0, balance_batches="step").args.balance_batches == "step"
    with pytest.raises(ValueError, match="MyTrainer defines odds_ratio_loss.*override _compute_loss"):
        hooks = {"odds_ratio_loss": lambda self: None}
        type("MyTrainer", (trl_fast.ORPOTrainer,), hooks)("x", train_dataset=color_pairs(2))


def test_images_of_a_prompt(tmp_path):
    """CPO learns from them in every layout alike; ORPO would learn their tokens."""
    shown = pictures(4)
    rows = [{**row, "images": [shown[number]]} for number, row in enumerate(color_triples(4))]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row |= {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected", "reference")}

    def trainer(method, layout="auto"):
        arguments = {"model": tiny_vision_model("qwen2_5_vl"), "processing_class": tiny_processor("qwen2_5_vl")}
        settings = {"batch_layout": layout, "max_steps": 1, "gradient_accumulation_steps": 1}
        arguments["train_dataset"] = Dataset.from_list(rows)
        return make_trainer(trl_fast, tmp_path / method, method=method, arguments=arguments, **settings)

    with pytest.raises(ValueError, match="ORPO learns the tokens of prompts too"):
        trainer("ORPO")
    with pytest.raises(ValueError, match="TPO reads texts only"):
        trainer("TPO")
    logs = []
    for layout in ("shared_prefix", "padded"):
        made = trainer("CPO", layout)
        made.train()
        assert made.layout.name == layout
        logs.append(made.state.log_history[:1])
    assert_same_logs(*logs)
