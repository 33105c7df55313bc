"""Prompts with images for vLLM: what its server and its own process are asked is what TRL's code asks them."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from trl.generation import vllm_client
from trl.generation.vllm_generation import VLLMGeneration

from support.vision_processors import pictures, tiny_processor
from support.vllm import END, fake_server, install_fake_vllm
from trl_fast.data.images.reader import ImageReader
from trl_fast.rollout import RolloutImages, SamplingSettings
from trl_fast.rollout.vllm_engine import VLLMColocatedEngine, VLLMServerEngine
from trl_fast.rollout.vllm_images import placed_features
from trl_fast.settings.server_url import ServerURL

SETTINGS = SamplingSettings(16, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, generation_kwargs={"seed": 3})
SIZE = 2


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("qwen2_5_vl")


@pytest.fixture(scope="module")
def prompts(processor):
    """Token ids, our images and Pillow's, of groups: with one image, with two, with none, and with another image."""
    one, other, larger = *pictures(2), *pictures(1, (84, 56), seed=7)
    reader, found = ImageReader(processor), []
    for own in ([one], [larger, one], [], [other]):
        parts = [*({"type": "image", "image": picture} for picture in own), {"type": "text", "text": "What is it?"}]
        found += [[{"role": "user", "content": parts}]] * SIZE
    ids = [reader.prompt_ids(messages) for messages in found]
    assert ids[0] == ids[-1]
    images = RolloutImages(reader).of_prompts(found)
    return ids, images, [[each.picture for each in own] or None for own in images]


def theirs(processor, client=None, llm=None):
    """TRL's generation, without the vLLM that it would start."""
    made = object.__new__(VLLMGeneration)
    values = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0, "logprobs": 0}
    values |= {"max_completion_length": 16, "structured_outputs_regex": None, "generation_kwargs": {"seed": 3}}
    values |= {"mode": "colocate" if client is None else "server", "enable_sleep_mode": False, "vllm_client": client}
    values |= {
        "processing_class": processor,
        "accelerator": PartialState(),
        "llm": llm,
        "tensor_parallel_size": 1,
        "model": torch.nn.Identity(),
    }
    vars(made).update(values)
    return made


def test_server_is_asked_as_by_trl(prompts, processor, monkeypatch):
    install_fake_vllm(monkeypatch)
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: True)
    ids, images, shown = prompts
    with fake_server() as server:
        client = vllm_client.VLLMClient(server.url)
        server.requests.clear()
        _, expected, logprobs, _ = theirs(processor, client).generate(ids, shown, SIZE)
        wanted = server.requests.copy()
        token = ImageReader(processor).image_token_id
        engine = VLLMServerEngine(
            ServerURL(server.url), device=torch.device("cuda"), end_ids={END}, timeout=5, image_token_id=token
        )
        server.requests.clear()
        rollout = engine.generate(ids, SETTINGS, images=images)
        asked = server.requests.copy()
    assert rollout.completion_ids == expected
    assert rollout.logprobs == [[position[0] for position in row] for row in logprobs]
    for requests in (asked, wanted):
        for _, _, body in requests:
            body.pop("request_id", None)
            body.get("sampling_params", {}).pop("stop_token_ids", None)
        # They are sent side by side.
        requests.sort(key=str)
    assert asked == wanted and len(asked) == 7
    assert {path for _, path, _ in asked} == {"/v1/chat/completions/render", "/inference/v1/generate"}


def test_a_server_without_the_endpoints(prompts, processor, monkeypatch):
    install_fake_vllm(monkeypatch)
    ids, images, _ = prompts
    PartialState()
    with fake_server({"/v1/chat/completions/render": (404, {})}) as server:
        engine = VLLMServerEngine(
            ServerURL(server.url), device=torch.device("cuda"), end_ids={END}, timeout=5, image_token_id=3
        )
        with pytest.raises(RuntimeError, match="404: .*; prompts with images need it: .* --enable-scale-out too"):
            engine.generate(ids, SETTINGS, images=images)


def test_llm_in_the_process_is_given_what_trl_gives_it(prompts, processor, monkeypatch):
    install_fake_vllm(monkeypatch)
    ids, images, shown = prompts
    engine = VLLMColocatedEngine("model", device=torch.device("cuda"), end_ids={END})
    engine.generate(ids, SETTINGS, images=images)
    _, given, parameters = engine.llm.log[-1]
    recorded = []

    def generate(rows, sampling_params, use_tqdm):
        recorded.extend(rows)
        return []

    monkeypatch.setattr("trl.generation.vllm_generation.SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr("trl.generation.vllm_generation.extract_logprobs", lambda outputs: ([], []))
    theirs(processor, llm=SimpleNamespace(generate=generate)).generate(ids, shown, SIZE)
    # TRL gives each prompt as often as it has completions.
    assert given == recorded[::SIZE] and [each.n for each in parameters] == [SIZE] * 4


def test_features_are_placed_at_runs_of_image_tokens():
    features = {"mm_hashes": {"image": ["a", "b"]}, "mm_placeholders": {"image": [None, None], "video": []}}
    placed = placed_features(features, [5, 9, 9, 6, 9], 9)
    places = [{"offset": 1, "length": 2}, {"offset": 4, "length": 1}]
    assert placed == {**features, "mm_placeholders": {"image": places, "video": []}}
    with pytest.raises(ValueError, match=r"the prompt has 1 runs of image tokens for 2 images; .*'colocate'"):
        placed_features(features, [5, 9, 9], 9)
