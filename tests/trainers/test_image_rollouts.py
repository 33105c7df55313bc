"""GRPO and RLOO on prompts with images against TRL 1.16.0 for the same completions, and layouts with each other."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import trl
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import trl_fast
import trl_fast.data.packing as packing
from support.image_rollouts import SETTINGS, brightness, logs_of, picture_prompts, trained
from support.rollouts import FixedEngine, FixedImageRollout
from support.training import assert_same_logs, make_trainer
from support.vision_processors import tiny_processor
from trl_fast.trainers.online.completions_log import report_completions

# The metrics are TRL's to the last digit only if no completion is left out or moved to another micro-batch.
OURS = {"skip_zero_advantages": False, "keep_groups_together": False}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "gemma3", "llava")]
FAMILIES = ["qwen2_5_vl", *OTHERS]


CASES = [
    ("GRPO", {"beta": 0.2, "num_iterations": 2, "learning_rate": 5e-3}),
    pytest.param("RLOO", {"beta": 0.05}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "settings"), CASES, ids=["GRPO", "RLOO"])
def test_steps_equal_trl(method, settings, family, folders, tmp_path, monkeypatch):
    how = (method, family, folders(family), monkeypatch)
    expected = trained(trl, tmp_path / "trl", *how, **settings)
    got = trained(trl_fast, tmp_path / "ours", *how, **settings, **OURS)
    assert got.updates.layout == "shared_prefix"
    assert_same_logs(logs_of(got), logs_of(expected))
    weights = dict(expected.model.named_parameters())
    for name, weight in got.model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["shared_prefix", pytest.param("packed", marks=pytest.mark.slow)])
def test_layouts_agree_and_images_pass_once_a_group(layout, folders, tmp_path, monkeypatch):
    """Prompts with and without images, of the same tokens and others."""
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    logs, passed, seen = {}, {}, []
    tower = Qwen2_5_VisionTransformerPretrainedModel
    forward = tower.forward

    def counting(self, pixels, *args, **given):
        seen.append(len(pixels))
        return forward(self, pixels, *args, **given)

    monkeypatch.setattr(tower, "forward", counting)
    for name in (layout, "padded"):
        how = {"mixed": True, "num_iterations": 2, "batch_layout": name, "per_device_train_batch_size": 8, **OURS}
        given = (trl_fast, tmp_path / name, "GRPO", "qwen2_5_vl", folders("qwen2_5_vl"), monkeypatch)
        logs[name] = logs_of(trained(*given, **how))
        passed[name] = sum(seen)
        seen.clear()
    assert_same_logs(logs[layout], logs["padded"])
    # A group is four completions, in one micro-batch of two or over both.
    assert passed["padded"] > 0 and passed["padded"] / passed[layout] > (1.5 if layout == "shared_prefix" else 0.9)


def test_a_generation_with_images_outlives_a_checkpoint(folders, tmp_path, monkeypatch):
    """Two optimizer steps on one generation, with a checkpoint between them: no completion is made again."""
    settings = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
    how = (trl_fast, tmp_path, "GRPO", "qwen2_5_vl", folders("qwen2_5_vl"), monkeypatch)
    whole = trained(*how, **settings, **OURS)
    again = trained(*how, **settings, **OURS, resume=str(tmp_path / "checkpoint-1"))
    assert not again.rollout_func.seen
    ours, theirs = (
        [log for log in logs_of(each) if log.get("step") == 2 and "loss" in log] for each in (again, whole)
    )
    assert_same_logs(ours, theirs)


def test_completions_are_logged_with_images(folders, tmp_path, monkeypatch, capsys):
    tables = []
    logger = SimpleNamespace(Image=lambda image: f"a picture of {image.size}", Table=lambda dataframe: dataframe)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(**vars(logger), log=tables.append))
    how = {"log_completions": True, "max_steps": 1}
    trainer = trained(
        *(trl_fast, tmp_path, "GRPO", "qwen2_5_vl", folders("qwen2_5_vl"), monkeypatch), **how, report_to="none"
    )
    report_completions(trainer.completions_log, 1, folder=tmp_path, count=1, unique_prompts=False, loggers=["trackio"])
    table = tables[0]["completions"]
    assert len(table) == 8 and set(map(len, table["image"])) <= {1, 2}
    assert table["image"].iloc[0][0] == "a picture of (56, 56)"
    saved = pd.read_parquet(tmp_path / "completions_00001.parquet")
    assert [part["type"] for part in saved["prompt"][0][0]["content"]][-2:] == ["image", "text"]
    assert "user: [image]" in capsys.readouterr().out


def test_images_are_refused_by_name(folders, tmp_path, monkeypatch):
    path = folders("qwen2_5_vl")
    arguments = {"model": path, "reward_funcs": brightness, "train_dataset": picture_prompts()}
    texts = picture_prompts().map(lambda row: {"prompt": "What is it?"}, remove_columns="prompt")
    with pytest.raises(ValueError, match="row 0: the prompt is text, but the dataset has images"):
        make_trainer(trl_fast, tmp_path, method="GRPO", arguments={**arguments, "train_dataset": texts}, **SETTINGS)
    given = {**arguments, "rollout_func": FixedImageRollout(tiny_processor("qwen2_5_vl"))}
    monkeypatch.setattr(FixedImageRollout, "tokens_of", lambda self, prompt: [5, 6, 7])
    trainer = make_trainer(trl_fast, tmp_path, method="GRPO", arguments=given, **SETTINGS)
    with pytest.raises(ValueError, match="prompt_ids for the prompt .* have 0 tokens .*, but 1 images with"):
        trainer.train()

    class Blind(FixedEngine):
        pass

    given = {**arguments, "rollout_engine": Blind(tiny_processor("qwen2_5_vl").tokenizer)}
    trainer = make_trainer(trl_fast, tmp_path, method="GRPO", arguments=given, **SETTINGS)
    with pytest.raises(ValueError, match="Blind.generate takes no argument `images`, but prompts have images"):
        trainer.train()
