"""Attributes of TRL 1.16.0's trainers on rows: they are here, say the same, and count when they are set later."""

import pytest
import trl
from transformers import TrainerCallback

import trl_fast
from support.supervised import sft_rows
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer

ROWS = {"SFT": lambda: sft_rows("text", 12), "DPO": color_pairs, "KTO": color_labels, "Reward": color_pairs}
# What is not here, and why.
LEFT = {
    **dict.fromkeys(("_name", "_paper", "_tag_names", "_template_file"), "the model card is written otherwise"),
    "_send_telemetry": "no telemetry is sent",
    "_tp_size": "tensor parallelism is refused",
    **dict.fromkeys(("_precompute_engine", "_precompute_model_hash"), "the cache of references has a key of its own"),
    "maybe_activation_offload_context": "offloading is a part of the model's layers",
    "_reject_skip_prepare_without_labels": "overriding it is refused",
    "_compute_kl_logps": "overriding it is refused",
}


@pytest.fixture
def make(model_path, reward_model_path, tmp_path):
    def make(module, method, **settings):
        model = reward_model_path if method == "Reward" else model_path
        arguments = {"model": model, "train_dataset": ROWS[method]()}
        return make_trainer(module, tmp_path / module.__name__, method=method, arguments=arguments, **settings)

    return make


@pytest.mark.parametrize("method", ROWS)
def test_each_attribute_of_trls_trainer_is_here_and_says_the_same(method, make):
    theirs, ours = make(trl, method), make(trl_fast, method)
    names = {name for name in {*dir(theirs), *vars(theirs)} if not name.startswith("__")}
    assert {name for name in names if not hasattr(ours, name)} <= LEFT.keys()
    assert not [name for name in LEFT if hasattr(ours, name)]
    plain = (bool, int, float, str, list, dict, type(None))
    said = {name: value for name, value in vars(theirs).items() if isinstance(value, plain)}
    # The last two are what transformers finds in a forward, which TRL has replaced.
    others = {"_memory_tracker", "hp_name", "current_flos", "model_init", "label_names", "can_return_loss"}
    for name in said.keys() - LEFT.keys() - others:
        value, own = said[name], getattr(ours, name)
        assert value == own or name in ("_signature_columns", "_metrics"), f"{name}: {own}, TRL has {value}"


class Schedule(TrainerCallback):
    """Sets attributes at the beginning of steps."""

    def __init__(self, trainer, *changes):
        self.trainer, self.changes = trainer, changes

    def on_step_begin(self, args, state, control, **kwargs):
        for path, value in self.changes[state.global_step].items():
            place = self.trainer.args if path.startswith("args.") else self.trainer
            setattr(place, path.removeprefix("args."), value)


CHANGES = {
    "DPO": [
        {"beta": 10.0, "label_smoothing": 0.2},
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"ld_alpha": 0.5},
    ],
    "DPO, divergence": [{"f_divergence_type": "js_divergence"}, {"loss_types": ["hinge"]}, {"beta": 0.5}],
    "KTO": [{"beta": 2.0}, {"desirable_weight": 3.0, "undesirable_weight": 0.5}, {"beta": 0.3}],
    "SFT": [{"args.loss_type": "dft"}, {"args.loss_type": "nll"}, {}],
    "Reward": [{"args.center_rewards_coefficient": 0.5}, {}, {"args.center_rewards_coefficient": None}],
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    ["DPO", "KTO", *(pytest.param(name, marks=SLOW) for name in CHANGES if name not in ("DPO", "KTO"))],
)
def test_attributes_set_by_a_callback_count_as_in_trl(name, make):
    logs = []
    for module in (trl, trl_fast):
        trainer = make(module, name.partition(",")[0])
        trainer.add_callback(Schedule(trainer, *CHANGES[name]))
        trainer.train()
        logs.append(trainer.state.log_history)
    assert_same_logs(logs[1], logs[0])
    plain = make(trl_fast, name.partition(",")[0])
    plain.train()
    assert plain.state.log_history[-1]["train_loss"] != pytest.approx(logs[1][-1]["train_loss"], rel=1e-4)


def test_a_value_that_no_loss_takes_is_refused_and_changes_nothing(make):
    trainer = make(trl_fast, "DPO")
    for name, value, said in (("beta", float("nan"), "beta"), ("loss_weights", [1, 2], "loss_weights")):
        before = getattr(trainer, name)
        with pytest.raises(ValueError, match=said):
            setattr(trainer, name, value)
        assert getattr(trainer, name) == before
    with pytest.raises(ValueError, match="loss_type=.'cpo'"):
        trainer.loss_types = ["cpo"]
    for name in ("precompute_ref_logps", "padding_free", "aux_loss_enabled"):
        with pytest.raises(AttributeError, match=f"DPOTrainer.{name} cannot be changed: "):
            setattr(trainer, name, True)


def test_what_trl_reads_once_can_be_changed_too(make):
    """TRL asks the model for what use_weighting needs, and for KTO's mismatched completions, from the start only."""
    for method, change in (("DPO", {"use_weighting": True}), ("KTO", {"loss_type": "apo_zero_unpaired"})):
        late, early = make(trl_fast, method, max_steps=1), make(trl_fast, method, max_steps=1, **change)
        for name, value in change.items():
            setattr(late, name, value)
        losses = []
        for trainer in (late, early):
            trainer.train()
            losses.append(trainer.state.log_history[-1]["train_loss"])
        assert losses[0] == losses[1]
