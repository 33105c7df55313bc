"""Lists the training methods: the config, the trainer, the step function, the command and the names in TRL of each.

The public names of `trl_fast`, the commands of `trl-fast` and the names that `import trl` answers are made from this
table. Reading it imports no method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_fast.lazy_imports import import_place


@dataclass(frozen=True)
class Method:
    """Describes one training method. A place is "module:name", and is imported when it is needed.

    Args:
        name: the method's name in commands, and the trainer's `method`.
        config: place of the config's class.
        trainer: place of the trainer's class.
        step: place of the function of a micro-batch: from a model and a batch to the loss and its metrics. The trainer
            and the planner call it.
        help: what is trained with, for `trl-fast --help`.
        reward_argument: the trainer's argument that takes reward functions and models; None: it takes none.
        takes_teacher: whether a teacher is needed, which the config's teacher_model_name_or_path names.
        trl_packages: packages of TRL, present or past, that have modules `NAME_config` and `NAME_trainer`.
        trl_names: further names in TRL's `NAME_trainer`, and their places.
        has_trl_script: whether TRL has, or had, a module `trl.scripts.NAME`.
    """

    name: str
    config: str
    trainer: str
    step: str
    help: str
    reward_argument: str | None = None
    takes_teacher: bool = False
    trl_packages: tuple[str, ...] = ("trl.trainer",)
    trl_names: Mapping[str, str] = field(default_factory=dict)
    has_trl_script: bool = True

    @property
    def exports(self) -> dict[str, str]:
        """Returns the public names of the method, config and trainer, and their places."""
        return {place.partition(":")[2]: place for place in (self.config, self.trainer)}

    def config_class(self) -> Any:
        """Imports the config's class, and nothing of the trainer."""
        return import_place(self.config)

    def trainer_class(self) -> Any:
        """Imports the trainer's class."""
        return import_place(self.trainer)


_WITH_IMAGES = "trl_fast.data.vision_collators"
_WITHOUT_REFERENCE = "trl_fast.trainers.base.reference_free:reference_free_step"
_METHODS = (
    Method(
        name="sft",
        config="trl_fast.trainers.sft_config:SFTConfig",
        trainer="trl_fast.trainers.sft:SFTTrainer",
        step="trl_fast.trainers.sft:sft_step",
        help="supervised fine-tuning",
        trl_names={
            "DataCollatorForLanguageModeling": "trl_fast.data:DataCollatorForLanguageModeling",
            "DataCollatorForVisionLanguageModeling": f"{_WITH_IMAGES}:DataCollatorForVisionLanguageModeling",
        },
    ),
    Method(
        name="dpo",
        config="trl_fast.trainers.dpo_config:DPOConfig",
        trainer="trl_fast.trainers.dpo:DPOTrainer",
        step="trl_fast.trainers.dpo:dpo_step",
        help="Direct Preference Optimization and its relatives, from pairs",
        trl_names={
            "DataCollatorForPreference": "trl_fast.data:DataCollatorForPreference",
            "DataCollatorForVisionPreference": f"{_WITH_IMAGES}:DataCollatorForVisionPreference",
        },
    ),
    Method(
        name="reward",
        config="trl_fast.trainers.reward_config:RewardConfig",
        trainer="trl_fast.trainers.reward:RewardTrainer",
        step="trl_fast.trainers.reward:reward_step",
        help="a reward model, from pairs",
        trl_names={"DataCollatorForPreference": "trl_fast.data:DataCollatorForReward"},
    ),
    Method(
        name="kto",
        config="trl_fast.trainers.kto_config:KTOConfig",
        trainer="trl_fast.trainers.kto:KTOTrainer",
        step="trl_fast.trainers.kto:kto_step",
        help="Kahneman-Tversky Optimization, from answers marked good or bad",
        trl_packages=("trl.trainer", "trl.experimental.kto"),
        trl_names={
            "DataCollatorForUnpairedPreference": "trl_fast.data:DataCollatorForUnpairedPreference",
            "DataCollatorForVisionUnpairedPreference": f"{_WITH_IMAGES}:DataCollatorForVisionUnpairedPreference",
        },
    ),
    Method(
        name="bco",
        config="trl_fast.trainers.bco_config:BCOConfig",
        trainer="trl_fast.trainers.bco:BCOTrainer",
        step="trl_fast.trainers.bco:bco_step",
        help="Binary Classifier Optimization, from answers marked good or bad",
        trl_packages=("trl.trainer", "trl.experimental.bco"),
        has_trl_script=False,
    ),
    Method(
        name="orpo",
        config="trl_fast.trainers.orpo_config:ORPOConfig",
        trainer="trl_fast.trainers.orpo:ORPOTrainer",
        step=_WITHOUT_REFERENCE,
        help="Odds Ratio Preference Optimization, from pairs",
        trl_packages=("trl.trainer", "trl.experimental.orpo"),
        has_trl_script=False,
    ),
    Method(
        name="cpo",
        config="trl_fast.trainers.cpo_config:CPOConfig",
        trainer="trl_fast.trainers.cpo:CPOTrainer",
        step=_WITHOUT_REFERENCE,
        help="Contrastive Preference Optimization, SimPO, from pairs",
        trl_packages=("trl.trainer", "trl.experimental.cpo"),
        has_trl_script=False,
    ),
    Method(
        name="tpo",
        config="trl_fast.trainers.tpo_config:TPOConfig",
        trainer="trl_fast.trainers.tpo:TPOTrainer",
        step=_WITHOUT_REFERENCE,
        help="Triple Preference Optimization, from pairs with a third",
        trl_packages=("trl.experimental.tpo",),
        has_trl_script=False,
        trl_names={"DataCollatorForTriplePreference": "trl_fast.data:DataCollatorForTriplePreference"},
    ),
    Method(
        name="grpo",
        config="trl_fast.trainers.grpo_config:GRPOConfig",
        trainer="trl_fast.trainers.grpo:GRPOTrainer",
        step="trl_fast.trainers.online.policy_step:policy_step",
        help="Group Relative Policy Optimization, from rewards of completions",
        reward_argument="reward_funcs",
    ),
    Method(
        name="rloo",
        config="trl_fast.trainers.rloo_config:RLOOConfig",
        trainer="trl_fast.trainers.rloo:RLOOTrainer",
        step="trl_fast.trainers.online.policy_step:policy_step",
        help="REINFORCE with leave-one-out baselines, from completions' rewards",
        reward_argument="reward_funcs",
    ),
    Method(
        name="gmpo",
        config="trl_fast.trainers.gmpo_config:GMPOConfig",
        trainer="trl_fast.trainers.gmpo:GMPOTrainer",
        step="trl_fast.trainers.online.policy_step:policy_step",
        help="Geometric-Mean Policy Optimization, from completions' rewards",
        reward_argument="reward_funcs",
        trl_packages=("trl.experimental.gmpo",),
        has_trl_script=False,
    ),
    Method(
        name="online_dpo",
        config="trl_fast.trainers.online_dpo_config:OnlineDPOConfig",
        trainer="trl_fast.trainers.online_dpo:OnlineDPOTrainer",
        step="trl_fast.trainers.online_dpo:online_dpo_step",
        help="DPO of pairs that the model samples and rewards order",
        reward_argument="reward_funcs",
        trl_packages=("trl.trainer", "trl.experimental.online_dpo"),
        has_trl_script=False,
    ),
    Method(
        name="a2po",
        config="trl_fast.trainers.a2po_config:A2POConfig",
        trainer="trl_fast.trainers.a2po:A2POTrainer",
        step="trl_fast.trainers.a2po:a2po_step",
        help="A*-PO: regression onto rewards less the prompts' values",
        reward_argument="reward_funcs",
        trl_packages=("trl.experimental.a2po",),
        has_trl_script=False,
    ),
    Method(
        name="ppo",
        config="trl_fast.trainers.ppo.config:PPOConfig",
        trainer="trl_fast.trainers.ppo.trainer:PPOTrainer",
        step="trl_fast.trainers.ppo.step:ppo_step",
        help="Proximal Policy Optimization, with a reward and a value model",
        reward_argument="reward_model",
        trl_packages=("trl.trainer", "trl.experimental.ppo"),
    ),
    Method(
        name="distillation",
        config="trl_fast.trainers.distillation.config:DistillationConfig",
        trainer="trl_fast.trainers.distillation.trainer:DistillationTrainer",
        step="trl_fast.trainers.distillation.step:distillation_step",
        help="a teacher's distributions, on the student's own completions",
        takes_teacher=True,
        trl_packages=("trl.trainer", "trl.experimental.distillation"),
    ),
    Method(
        name="gkd",
        config="trl_fast.trainers.distillation.gkd_config:GKDConfig",
        trainer="trl_fast.trainers.distillation.gkd:GKDTrainer",
        step="trl_fast.trainers.distillation.step:distillation_step",
        help="the same, mixed with completions of the dataset",
        takes_teacher=True,
        trl_packages=("trl.trainer", "trl.experimental.gkd"),
        has_trl_script=False,
    ),
    Method(
        name="gold",
        config="trl_fast.trainers.distillation.gold_config:GOLDConfig",
        trainer="trl_fast.trainers.distillation.gold:GOLDTrainer",
        step="trl_fast.trainers.distillation.gold_step:gold_step",
        help="the same, from a teacher that may have another tokenizer",
        takes_teacher=True,
        trl_packages=("trl.experimental.gold",),
        has_trl_script=False,
    ),
    Method(
        name="server_distillation",
        config="trl_fast.trainers.distillation.server_distillation_config:ServerDistillationConfig",
        trainer="trl_fast.trainers.distillation.server_distillation:ServerDistillationTrainer",
        step="trl_fast.trainers.distillation.server_step:server_distillation_step",
        help="distillation of a teacher that a vLLM server runs",
        trl_packages=("trl.experimental.server_distillation",),
        has_trl_script=False,
    ),
    Method(
        name="iw_opd",
        config="trl_fast.trainers.distillation.iw_opd_config:IWOPDConfig",
        trainer="trl_fast.trainers.distillation.iw_opd:IWOPDTrainer",
        step="trl_fast.trainers.distillation.iw_opd_step:iw_opd_step",
        help="a policy gradient by what a teacher says of the student's tokens",
        takes_teacher=True,
        trl_packages=("trl.experimental.iw_opd",),
        has_trl_script=False,
    ),
    Method(
        name="sdft",
        config="trl_fast.trainers.self_distillation.sdft_config:SDFTConfig",
        trainer="trl_fast.trainers.self_distillation.sdft:SDFTTrainer",
        step="trl_fast.trainers.self_distillation.step:self_distillation_step",
        help="the model's own distributions when it is told more",
        trl_packages=("trl.experimental.sdft",),
        has_trl_script=False,
    ),
    Method(
        name="sdpo",
        config="trl_fast.trainers.self_distillation.sdpo_config:SDPOConfig",
        trainer="trl_fast.trainers.self_distillation.sdpo:SDPOTrainer",
        step="trl_fast.trainers.self_distillation.sdpo_update:sdpo_step",
        help="the same after it has seen a rewarded completion, or feedback",
        reward_argument="reward_funcs",
        trl_packages=("trl.experimental.sdpo",),
        has_trl_script=False,
    ),
)

# By name, in the order in which they are shown.
METHODS: Mapping[str, Method] = {method.name: method for method in _METHODS}
