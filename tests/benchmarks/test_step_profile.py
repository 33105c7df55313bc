"""A profile of a step: every operator has a kind, and the kinds' seconds sum to the step's."""

import io

import pytest
import torch
from rich.console import Console

import trl_fast
from benchmarks.step_profile import StepProfiler, kind_of, profile_last_step
from support.models import tiny_model
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import make_trainer

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", "trl_fast::product"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "_TreeAttentionBackward"),
    "row kernels": ("trl_fast::row_scores", "trl_fast::linear_scores", "trl_fast::selective_scores_backward"),
    "layer kernels": ("trl_fast::rms_norm", "trl_fast::residual_rms_norm", "trl_fast::rotary", "trl_fast::embedding"),
    "optimizer": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::_foreach_mul_"),
    "copies, fills, pages": ("aten::copy_", "aten::fill_", "aten::cat", "trl_fast::pooled_empty"),
    "elementwise": ("aten::mul", "aten::add_", "aten::silu_backward"),
    "host": ("aten::view", "aten::empty", "PythonDispatchMode", "autograd::engine::evaluate_function: MmBackward0"),
}


@pytest.mark.parametrize(("kind", "operators"), KINDS.items())
def test_an_operator_has_its_kind(kind, operators):
    assert {kind_of(operator) for operator in operators} == {kind}


def test_the_last_step_of_a_training_is_profiled(tmp_path):
    tokenizer = build_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = {"model": str(tmp_path / "model"), "train_dataset": sft_rows("text", 16)}
    trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, max_steps=3)
    before = [*trainer.callback_handler.callbacks]
    found = profile_last_step(trainer)
    assert trainer.state.global_step == 3
    seconds = found.by_kind()
    assert sum(seconds.values()) == pytest.approx(found.seconds)
    assert {"products", "attention", "optimizer", "host"} <= {kind for kind, spent in seconds.items() if spent > 0}
    assert found.user + found.system > 0
    assert trainer.callback_handler.callbacks == before
    text = io.StringIO()
    found.print(Console(file=text, width=200), "a step")
    assert all(kind in text.getvalue() for kind in seconds) and "page faults" in text.getvalue()


def test_nothing_is_profiled_before_the_last_step():
    profiler = StepProfiler()
    state = type("State", (), {"global_step": 1, "max_steps": 3})
    profiler.on_step_end(None, state, None)
    torch.ones(2).add(1)
    assert profiler.result is None and profiler._profiler is None
