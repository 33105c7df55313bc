"""The arguments of compute_metrics, and predict, are as TRL 1.16.0's; a model attends as it was loaded to."""

import numpy as np
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM

import trl_fast
from support.supervised import sft_rows
from support.training import color_labels, color_pairs, make_trainer

ROWS = {"SFT": lambda n: sft_rows("text", n), "DPO": color_pairs, "KTO": color_labels, "Reward": color_pairs}


@pytest.fixture
def make(model_path, reward_model_path, tmp_path):
    def make(module, method, arguments=None, **settings):
        model = reward_model_path if method == "Reward" else model_path
        arguments = {"model": model, "train_dataset": ROWS[method](8), **(arguments or {})}
        settings = {"max_steps": 1, "gradient_accumulation_steps": 1, **settings}
        return make_trainer(module, tmp_path / module.__name__, method=method, arguments=arguments, **settings)

    return make


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "method", ["SFT", "DPO", *(pytest.param(name, marks=pytest.mark.slow) for name in ("KTO", "Reward"))]
)
def test_inputs_for_metrics_are_those_of_trl(method, make):
    def given(module):
        seen = []
        arguments = {
            "eval_dataset": {"few": ROWS[method](5), "stream": ROWS[method](4).to_iterable_dataset()},
            "compute_metrics": lambda prediction: seen.append(prediction) or {"rows": len(prediction.inputs)},
        }
        trainer = make(module, method, arguments, include_for_metrics=["inputs"], per_device_eval_batch_size=2)
        metrics = trainer.evaluate({"few": ROWS[method](5)})
        return metrics["eval_few_rows"], seen[-1]

    (theirs_rows, theirs), (ours_rows, ours) = given(trl), given(trl_fast)
    assert ours_rows == theirs_rows
    assert np.array_equal(ours.inputs, theirs.inputs)
    for mine, other in ((ours.predictions, theirs.predictions), (ours.label_ids, theirs.label_ids)):
        assert np.allclose(mine, other, rtol=1e-4, atol=1e-4) if isinstance(other, np.ndarray) else mine == other


@pytest.mark.parametrize("method", ROWS)
def test_predict_prepares_raw_rows(method, make):
    trainer = make(trl_fast, method)
    raw, evaluated = trainer.predict(ROWS[method](4)), trainer.evaluate(ROWS[method](4))
    assert raw.metrics["test_loss"] == evaluated["eval_loss"] and len(raw.predictions) in (4, 8)


@pytest.mark.parametrize("method", ["SFT", "DPO"])
def test_a_model_with_eager_attention_keeps_it_outside_of_rows(method, make, model_path):
    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager", dtype="float32")
    trainer = make(trl_fast, method, {"model": model})
    trainer.train()
    assert trainer.data_collator.layout != "padded"
    ids = torch.arange(6, 18).view(2, 6)
    attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == model.config.num_hidden_layers and attentions[0].shape == (2, 4, 6, 6)
