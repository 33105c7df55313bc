"""How many operations a step takes, as transformers counts them."""

from transformers import PreTrainedModel, Trainer

import trl_fast
from support.training import color_pairs, make_trainer


def test_they_are_those_of_the_base_and_weights_are_counted_once(model_path, tmp_path, monkeypatch):
    trainer = make_trainer(trl_fast, tmp_path, arguments={"model": model_path, "train_dataset": color_pairs(12)})
    first, second, *_ = map(trainer.batches.unread, trainer.get_train_dataloader())
    expected = [Trainer.floating_point_ops(trainer, {"input_ids": batch.input_ids}) for batch in (first, second)]
    counts, plain = [], PreTrainedModel.num_parameters
    monkeypatch.setattr(PreTrainedModel, "num_parameters", lambda *a, **k: counts.append(1) or plain(*a, **k))
    assert [trainer.floating_point_ops(batch) for batch in (first, second, first)] == [*expected, expected[0]]
    assert 0 < expected[0] != expected[1] and len(counts) == 1
