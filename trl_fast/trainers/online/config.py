"""Defines what the configs of GRPO and RLOO share: sampling, engines, rewards, and when completions are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trl_fast.settings.choices import check_choice, one_of
from trl_fast.settings.older_names import older_name
from trl_fast.settings.ranges import check_ranges

from ..base.reference_config import ReferenceConfig

if TYPE_CHECKING:
    from trl_fast.rollout import SamplingSettings

VLLM_MODES = ("colocate", "server")


@dataclass
class OnlineConfig(ReferenceConfig):
    """Holds the arguments of the methods that sample their own completions.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    unit: ClassVar[str] = "completions"
    first_metrics: ClassVar[tuple[str, ...]] = (
        *("reward", "reward_std", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio"),
        *("loss", "grad_norm", "learning_rate"),
    )

    disable_dropout: bool = False
    """Switch dropout off in the model and the reference."""

    remove_unused_columns: bool | None = False
    """Drop all columns but the prompt; reward functions then cannot read them."""

    max_length: int | None = None
    """Has no effect: prompts are never cut, and completions have max_completion_length."""

    cast_lm_head_to_fp32: bool = False
    """Keep the head's weights in float32 and compute its logits in float32."""

    shuffle_dataset: bool | None = True
    """Shuffle the training prompts."""

    # Sampling.
    num_generations: int | None = 8
    """Completions for each prompt; they are compared with each other."""

    num_generations_eval: int | None = None
    """Completions for each prompt in evaluation. None: num_generations."""

    max_completion_length: int | None = 512
    """Tokens after which a completion is cut off."""

    generation_batch_size: int | None = None
    """Completions made at a time, in all processes. None: by steps_per_generation."""

    steps_per_generation: int | None = None
    """Micro-batches that one generation serves. None: gradient_accumulation_steps."""

    temperature: float = 1.0
    """Divides the logits, in sampling and in the loss; higher: more varied completions."""

    top_p: float = 1.0
    """Sample from the likeliest tokens that have this probability together; 1: from all."""

    top_k: int = 0
    """Sample from so many likeliest tokens; 0: from all."""

    min_p: float | None = None
    """Drop tokens less likely than this share of the likeliest one's probability. None: drop none."""

    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred before get rarer; below 1, more frequent."""

    generation_kwargs: dict[str, Any] | str | None = None
    """Further arguments of the sampler, which win over those above. None: none."""

    chat_template_kwargs: dict[str, Any] | str | None = None
    """Keyword arguments of the chat template, for conversational prompts. None: none."""

    cache_implementation: str | None = None
    """How transformers' generation keeps keys and values. None: its default."""

    ds3_gather_for_generation: bool = True
    """With DeepSpeed ZeRO-3, gather the weights for generation: faster, but they must fit one GPU."""

    # vLLM.
    use_vllm: bool = False
    """Generate with vLLM, which must be installed."""

    vllm_mode: str = one_of(VLLM_MODES, default="colocate")
    """Where vLLM runs: colocate (on the training GPUs) or server (started by `vllm serve`)."""

    vllm_model_impl: str = "vllm"
    """Model implementation in vLLM: vllm or transformers."""

    vllm_enable_sleep_mode: bool = False
    """Free the memory of the colocated engine during the update."""

    vllm_structured_outputs_regex: str | None = None
    """Regular expression that completions must match. None: any text."""

    vllm_server_base_url: str | None = field(default=None, repr=False)
    """URL of the server, such as http://localhost:8000. None: vllm_server_host and vllm_server_port."""

    vllm_server_host: str = "0.0.0.0"
    """Host of the server."""

    vllm_server_port: int = 8000
    """Port of the server."""

    vllm_server_timeout: float = 240.0
    """Seconds to wait for the server to be up."""

    vllm_group_port: int = 51216
    """Port of the process group that sends weights to the server."""

    vllm_gpu_memory_utilization: float = 0.3
    """Share of a GPU's memory for the colocated engine."""

    vllm_max_model_length: int | None = None
    """Longest prompt + completion of the engine, in tokens. None: what the model's config says."""

    vllm_tensor_parallel_size: int = 1
    """GPUs that a colocated engine spans."""

    # transformers' continuous batching.
    use_transformers_continuous_batching: bool = False
    """Not served: generation computes each prompt once by itself."""

    transformers_continuous_batching_config: dict[str, Any] | str | None = None
    """Has no effect: see use_transformers_continuous_batching."""

    # The update.
    beta: float = 0.0
    """Weight of the KL divergence from the reference; 0: none, and no reference is loaded."""

    num_iterations: int = 1
    """Updates on the same completions (PPO's epochs)."""

    epsilon: float = 0.2
    """How far the probability ratio may fall below 1, and rise above it, before it is clipped."""

    epsilon_high: float | None = None
    """How far the ratio may rise above 1. None: epsilon."""

    reward_weights: list[float] | None = None
    """Weights of the reward functions, one for each. None: 1 each."""

    reward_timeout: float | None = None
    """Seconds after which a reward function that has not answered is an error. None: no limit."""

    mask_truncated_completions: bool = False
    """Do not learn from completions that were cut off."""

    skip_zero_advantages: bool = True
    """Leave completions whose gradient is zero out of the update.

    Their advantage is zero, and there is no KL or entropy term. Losses and gradients are the same; the entropy metric
    is that of the others.
    """

    keep_groups_together: bool = True
    """Put completions of a prompt into one micro-batch, so that the prompt is computed once.

    This is done where the gradient of a step is the same anyway. Metrics that are means over micro-batches differ a
    little.
    """

    # Logging.
    log_completions: bool = False
    """Show and save completions with their rewards, every logging_steps steps."""

    num_completions_to_print: int | None = None
    """Completions that are shown. None: all."""

    log_multimodal: bool = True
    """Whether the tables of loggers have the images of prompts and of tools' results too."""

    log_unique_prompts: bool = False
    """Show each prompt once."""

    # Names of older TRL versions, and of other methods.
    max_new_tokens: int | None = older_name(now="max_completion_length")
    max_prompt_length: int | None = older_name("it works (longer prompts lose their beginning).")
    use_liger_loss: bool | None = older_name("the fused head is always on, so it has no effect.")
    wandb_log_unique_prompts: bool | None = older_name(now="log_unique_prompts")
    vllm_guided_decoding_regex: str | None = older_name(now="vllm_structured_outputs_regex")
    use_transformers_paged: bool | None = older_name(now="use_transformers_continuous_batching")

    _VALID_DICT_FIELDS = ReferenceConfig._VALID_DICT_FIELDS + [
        "generation_kwargs",
        "chat_template_kwargs",
        "transformers_continuous_batching_config",
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "vllm_mode")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True would cut groups of completions apart; set it to False and choose "
                "per_device_train_batch_size"
            )
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching=True is not served: generation computes each prompt once by "
                "itself; leave it out, or set use_vllm=True"
            )
        if self.sync_ref_model and self.beta == 0:
            raise ValueError(
                f"sync_ref_model=True with beta={self.beta}: without a KL term there is no reference model to sync; "
                "set beta above 0 or sync_ref_model=False"
            )
        if not isinstance(self.generation_kwargs, dict | None):
            raise ValueError(
                f"generation_kwargs: expected a dict of the sampler's arguments, got {self.generation_kwargs!r} of "
                f"type {type(self.generation_kwargs).__name__}; of a GenerationConfig give to_diff_dict()"
            )
        if self.vllm_server_base_url is not None or (self.use_vllm and self.vllm_mode == "server"):
            from trl_fast.settings.server_url import server_url

            server_url(self)
        self._divide_generations()
        self.sampling_settings()

    def _divide_generations(self) -> None:
        """Fills in generation_batch_size and steps_per_generation from each other."""
        from trl_fast.settings.divisors import divisors, either, least_count, multiples_around

        per_step = self.per_device_train_batch_size * self.world_size
        shown = f"per_device_train_batch_size * processes = {self.per_device_train_batch_size} * {self.world_size}"
        given = self.generation_batch_size is not None
        if not given:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = per_step * self.steps_per_generation
        elif self.generation_batch_size % per_step:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} is no multiple of {shown}; set it to "
                f"{either(multiples_around(self.generation_batch_size, per_step))}, or leave it out"
            )
        elif self.steps_per_generation not in (None, self.generation_batch_size // per_step):
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} and steps_per_generation="
                f"{self.steps_per_generation} contradict each other ({shown}); give one of them"
            )
        else:
            self.steps_per_generation = self.generation_batch_size // per_step
        if self.generation_batch_size % self.num_generations:
            if given:
                whole = math.lcm(self.num_generations, per_step)
                remedy = f"generation_batch_size={either(multiples_around(self.generation_batch_size, whole))}"
            else:
                size = least_count(self.num_generations, self.world_size * self.steps_per_generation)
                remedy = f"per_device_train_batch_size={size}"
            fewer = divisors(self.generation_batch_size, 2)
            raise ValueError(
                f"num_generations={self.num_generations} does not divide the {self.generation_batch_size} completions "
                f"of a generation ({shown}, times steps_per_generation={self.steps_per_generation}); use {remedy}"
                f"{f', or num_generations={either(fewer)}' if fewer else ''}"
            )
        if self.eval_strategy != "no":
            self.check_eval_batch()

    def check_values(self) -> None:
        """Checks the arguments that may be changed later.

        Raises:
            ValueError: one is out of its range, or none of its choices.
        """
        check_ranges(self)
        self.sampling_settings()

    def check_eval_batch(self) -> None:
        """Raises ValueError if a batch of the evaluation would not hold all completions of its prompts."""
        from trl_fast.settings.divisors import divisors, either, least_count

        evaluated = self.per_device_eval_batch_size * self.world_size
        count = self.generations("eval")
        if evaluated % count:
            raise ValueError(
                f"num_generations_eval={count} does not divide the {evaluated} completions of an evaluation batch "
                f"(per_device_eval_batch_size={self.per_device_eval_batch_size} * {self.world_size} processes); use "
                f"num_generations_eval={either(divisors(evaluated))}, or per_device_eval_batch_size="
                f"{least_count(count, self.world_size)}"
            )

    def generations(self, mode: str) -> int:
        """Returns the number of completions for each prompt in "train" or "eval"."""
        return (self.num_generations_eval or self.num_generations) if mode == "eval" else self.num_generations

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, for files and trackers, without the password of vllm_server_base_url."""
        return {**super().to_dict(), "vllm_server_base_url": self._shown_url()}

    def __str__(self) -> str:
        shown = super().__str__()
        url = self.vllm_server_base_url
        return shown.replace(url, str(self._shown_url())) if url else shown

    def _shown_url(self) -> str | None:
        """Returns vllm_server_base_url without its password."""
        if self.vllm_server_base_url is None:
            return None
        from trl_fast.settings.server_url import without_password

        return without_password(self.vllm_server_base_url)

    @property
    def generate_every(self) -> int:
        """Returns the number of micro-batches after which new completions are made."""
        return self.steps_per_generation * self.num_iterations

    @property
    def is_on_policy(self) -> bool:
        """Says whether the policy of the update is always the one that sampled: each step makes new completions."""
        return self.gradient_accumulation_steps % self.generate_every == 0

    def sampling_settings(self) -> SamplingSettings:
        """Returns the settings by which completions are sampled.

        Raises:
            ValueError: a value is out of its range.
        """
        from trl_fast.rollout import SamplingSettings

        return SamplingSettings(
            max_completion_length=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            generation_kwargs=self.generation_kwargs,
            cache_implementation=self.cache_implementation,
        )
