"""Defines what the configs of all methods share that sample completions: sampling, engines, the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trl_fast.settings.choices import check_choice, one_of
from trl_fast.settings.ranges import check_ranges

from ..base.config import BaseConfig

if TYPE_CHECKING:
    from trl_fast.rollout import SamplingSettings

VLLM_MODES = ("colocate", "server")


@dataclass
class SamplingConfig(BaseConfig):
    """Holds the arguments of sampling: lengths, distributions, engines, and the table of completions.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    unit: ClassVar[str] = "completions"
    # The argument that limits a completion's tokens.
    length_setting: ClassVar[str] = "max_completion_length"
    # What a batch size that changes during training would do.
    other_batch_size: ClassVar[str] = "sample a batch's completions again"
    # The arguments that may hold a password, which is shown nowhere.
    url_settings: ClassVar[tuple[str, ...]] = ("vllm_server_base_url",)

    learning_rate: float = 1e-6
    """Initial learning rate of AdamW."""

    disable_dropout: bool = False
    """Switch dropout off in the model and the reference."""

    remove_unused_columns: bool | None = False  # type: ignore[assignment]  # as TRL's
    """Drop all columns but the prompt; reward functions then cannot read them."""

    max_length: int | None = None
    """Has no effect: prompts are never cut, and completions have max_completion_length."""

    shuffle_dataset: bool | None = True
    """Shuffle the training prompts."""

    max_completion_length: int | None = 512
    """Tokens after which a completion is cut off."""

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

    # Logging.
    log_completions: bool = False
    """Show and save completions with their rewards, every logging_steps steps."""

    num_completions_to_print: int | None = None
    """Completions that are shown. None: all."""

    log_multimodal: bool = True
    """Whether the tables of loggers have the images of prompts and of tools' results too."""

    log_unique_prompts: bool = False
    """Show each prompt once."""

    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["generation_kwargs", "chat_template_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "vllm_mode")
        if self.auto_find_batch_size:
            raise ValueError(
                f"auto_find_batch_size=True would {self.other_batch_size}; set it to False and choose "
                "per_device_train_batch_size"
            )
        if not isinstance(self.generation_kwargs, dict | None):
            raise ValueError(
                f"generation_kwargs: expected a dict of the sampler's arguments, got {self.generation_kwargs!r} of "
                f"type {type(self.generation_kwargs).__name__}; of a GenerationConfig give to_diff_dict()"
            )
        if self.vllm_server_base_url is not None or (self.use_vllm and self.vllm_mode == "server"):
            from trl_fast.settings.server_url import server_url

            server_url(self)
        self.sampling_settings()

    def check_values(self) -> None:
        """Checks the arguments that may be changed later.

        Raises:
            ValueError: one is out of its range, or none of its choices.
        """
        check_ranges(self)
        self.sampling_settings()

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, for files and trackers, without the passwords of servers."""
        return {**super().to_dict(), **self._shown_urls()}

    def __str__(self) -> str:
        shown = super().__str__()
        for name, url in self._shown_urls().items():
            given = getattr(self, name)
            shown = shown.replace(given, str(url)) if given else shown
        return shown

    def _shown_urls(self) -> dict[str, str | None]:
        """Returns the servers' addresses by setting, without passwords."""
        urls = {name: getattr(self, name) for name in self.url_settings}
        if not any(urls.values()):
            return urls
        from trl_fast.settings.server_url import without_password

        return {name: without_password(url) for name, url in urls.items()}

    @property
    def completions_at_a_time(self) -> int:
        """Returns the completions that a process samples at a time, at most."""
        return self.per_device_train_batch_size

    def sampling_settings(self) -> SamplingSettings:
        """Returns the settings by which completions are sampled.

        Raises:
            ValueError: a value is out of its range.
        """
        from trl_fast.rollout import SamplingSettings

        keywords: Any = self.generation_kwargs
        return SamplingSettings(
            max_completion_length=getattr(self, self.length_setting),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            generation_kwargs=keywords,
            cache_implementation=self.cache_implementation,
        )


def check_rows_are_whole(config: BaseConfig) -> None:
    """Checks that each process computes its rows alone, as a method with a teacher's distributions has to.

    Raises:
        ValueError: processes are to share rows.
    """
    for name in ("cp_size", "sp_size"):
        size = getattr(config.parallelism_config, name, None) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config: {name}={size}: a student and its teacher are not computed on shared rows; use "
                f"{name}=1, and FSDP2 to share the weights"
            )
