"""No attention across examples: changing one example of a packed row changes nothing of the others, bit for bit."""

from itertools import accumulate, pairwise

import pytest
import torch

import trl_fast
from support.models import save_tiny_model
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import make_trainer
from trl_fast.modeling.loading import base_model

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny_model(folder / name, build_tokenizer(), name, **more) for name, more in FAMILIES.items()}


def packed_batch(model_path, tmp_path, **settings):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 9)}
    settings = {"packing": True, "max_length": 40, "per_device_train_batch_size": 2, **settings}
    trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, **settings)
    trainer.model.eval()
    return trainer, next(iter(trainer.get_train_dataloader())).token_batch()


def places(batch):
    """First and last + 1 place of each sequence among the flattened tokens."""
    if batch.sequence_lengths is not None:
        return list(pairwise([0, *accumulate(batch.sequence_lengths)]))
    width = batch.input_ids.shape[1]
    return [(row * width, row * width + length) for row, length in enumerate(batch.branch_lengths.tolist())]


def unchanged(family, before, after):
    """Bit for bit; experts get other rows beside an example's own, and their products round accordingly."""
    return torch.allclose(before, after, rtol=0, atol=1e-5) if "moe" in family else torch.equal(before, after)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_examples_do_not_see_each_other(family, strategy, layout, model_of, tmp_path):
    trainer, batch = packed_batch(model_of[family], tmp_path, packing_strategy=strategy, batch_layout=layout)
    assert len(batch) > 2 and (layout == "padded" or len(batch.input_ids) == 1)
    with torch.no_grad():
        before = trainer.score(trainer.model, batch).tokens.logprobs
        for index, (start, end) in enumerate(places(batch)):
            changed = batch.input_ids.clone().flatten()
            changed[start:end] = (changed[start:end] + 7) % 300 + 3
            altered = type(batch)(**{**vars(batch), "input_ids": changed.view_as(batch.input_ids)})
            after = trainer.score(trainer.model, altered).tokens.logprobs
            own = batch.branch == index
            assert unchanged(family, before[~own], after[~own])
            assert not own.any() or not torch.equal(before[own], after[own])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_reaches_another_example(family, model_of, tmp_path):
    trainer, batch = packed_batch(model_of[family], tmp_path)
    reached = []
    embeddings = base_model(trainer.model).get_input_embeddings()
    embeddings.register_forward_hook(lambda module, given, output: reached.append(output) or output.retain_grad())
    logprobs = trainer.score(trainer.model, batch).tokens.logprobs
    own = batch.branch == 1
    logprobs[own].sum().backward()
    touched = reached[0].grad[0].abs().sum(-1) > 0
    start, end = places(batch)[1]
    assert touched[start : end - 1].all() and not touched[:start].any() and not touched[end:].any()


def test_a_wrapped_row_is_one_sequence_and_rows_do_not_see_each_other(model_of, tmp_path):
    """TRL's wrapped rows are cut out of one stream of tokens, in which an example sees the one before it."""
    trainer, batch = packed_batch(model_of["llama"], tmp_path, packing_strategy="wrapped")
    assert len(batch) == 2 and max(batch.sequence_lengths) == 40
    with torch.no_grad():
        before = trainer.score(trainer.model, batch).tokens.logprobs
        changed = batch.input_ids.clone()
        changed[0, 0] += 1
        altered = type(batch)(**{**vars(batch), "input_ids": changed})
        after = trainer.score(trainer.model, altered).tokens.logprobs
    first = batch.branch == 0
    assert torch.equal(before[~first], after[~first]) and not torch.equal(before[first], after[first])
