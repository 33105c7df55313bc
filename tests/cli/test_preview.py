"""`trl-fast preview`: what it shows is what the trainer trains on."""

import io
import json

import pytest
from rich.console import Console

from support.rollouts import color_prompts
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import color_labels, color_pairs
from trl_fast.cli.main import main
from trl_fast.cli.preview import make_parser
from trl_fast.cli.preview_examples import Examples
from trl_fast.cli.preview_report import Report, show
from trl_fast.cli.preview_tokens import CONTEXT, CUT, LEARNED, TokenTexts, token_lines
from trl_fast.cli.training import make_trainer, model_options
from trl_fast.trainers.methods import METHODS

CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--dataloader_pin_memory", "false"]
ROWS = {
    "sft": lambda: sft_rows("prompt and completion"),
    "dpo": color_pairs,
    "reward": color_pairs,
    "kto": color_labels,
    "grpo": color_prompts,
}
REWARD = ("--reward_funcs", "get_soft_overlong_punishment", "--max_completion_length", "8")


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def examples(model_path, tmp_path):
    """Returns the examples of a method, and the arguments as the command line's parser gives them."""

    def examples(method, *flags, rows=None, count=1000):
        data = write(tmp_path / "rows.jsonl", ROWS[method]() if rows is None else rows)
        words = ["--model_name_or_path", model_path, "--dataset_name", data, *CPU, *flags]
        _, script_args, args, model_args, mixture, _ = make_parser(METHODS[method]).parse_args_and_config(words)
        args.model_init_kwargs = model_options(args, model_args)
        from trl_fast.cli.datasets import load_train_and_test

        dataset = load_train_and_test(script_args, mixture, with_test=False)[0]
        return Examples(METHODS[method], args, model_path, dataset, count), (script_args, args, model_args, mixture)

    return examples


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "kto", "grpo"])
def test_rows_and_batches_are_the_trainers(method, examples, tmp_path):
    extra = REWARD if method == "grpo" else ("--max_length", "26")
    flags = ("--output_dir", str(tmp_path / "out"), *extra)
    shown, parsed = examples(method, *flags)
    trainer = make_trainer(METHODS[method], *parsed)
    columns = [name for name in trainer.token_columns if name in shown.prepared.column_names]
    assert columns and shown.prepared.select_columns(columns)[:] == trainer.train_dataset.select_columns(columns)[:]
    if method == "grpo":
        assert shown.layout == trainer.updates.layout
        return
    assert shown.layout == trainer.data_collator.layout
    ours = shown.collator.collate([shown.prepared[i] for i in range(4)])
    theirs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)]).token_batch()
    for name in ("input_ids", "position_ids", "score_positions", "targets"):
        assert (ours[name] == theirs[name]).all()


def test_no_weights_are_loaded(examples, monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("weights are read"))
    shown, _ = examples("dpo")
    assert {parameter.device.type for parameter in shown.model.parameters()} == {"meta"}


def kinds(part):
    return "".join({LEARNED: "L", CONTEXT: ".", CUT: "x"}[kind] for kind in part.kinds)


def test_a_pairs_parts_with_what_max_length_cuts(examples):
    shown, _ = examples("dpo", "--max_length", "20")
    (example,) = shown.of_row(2)
    prompt, chosen, rejected = example.parts
    assert [part.name for part in example.parts] == ["prompt", "chosen", "rejected"]
    room = 20 - len(prompt.ids)
    assert kinds(prompt) == "." * len(prompt.ids)
    assert kinds(chosen) == "L" * room + "x" * (len(chosen.ids) - room)
    assert (chosen.position, chosen.kept) == (len(prompt.ids), room)
    before, after, learned = shown.tokens_of_rows()
    assert before[2] == 2 * len(prompt.ids) + len(chosen.ids) + len(rejected.ids)
    assert after[2] == 2 * len(prompt.ids) + chosen.kept + rejected.kept
    assert learned == sum(len(shown.collator.collate([row]).targets) for row in shown.prepared)


def test_keep_end_cuts_the_prompts_beginning(examples):
    shown, _ = examples("dpo", "--max_length", "10", "--truncation_mode", "keep_end")
    prompt, chosen, rejected = shown.of_row(0)[0].parts
    # The prompt is shown as the completion has it that leaves most of it.
    kept = 10 - len(rejected.ids)
    assert 0 < kept < len(prompt.ids) and kinds(prompt) == "x" * (len(prompt.ids) - kept) + "." * kept
    assert chosen.note == f"of its prompt the last {10 - len(chosen.ids)} tokens are kept"


def test_the_end_of_a_prompt_is_kept_where_its_tokens_are_all_alike(examples):
    pair = {"prompt": "a a a a a a a a", "chosen": " blue", "rejected": " blues"}
    shown, _ = examples("dpo", "--max_length", "10", "--truncation_mode", "keep_end", rows=[pair])
    prompt = kinds(shown.of_row(0)[0].parts[0])
    assert "x" in prompt and prompt == "x" * prompt.count("x") + "." * prompt.count(".")


def test_rows_that_are_dropped_are_named(examples):
    rows = [*color_pairs(2), {"prompt": "What color is the sea? " * 20, "chosen": " blue", "rejected": " red"}]
    shown, _ = examples("dpo", "--max_length", "40", rows=rows)
    assert shown.dropped == [2] and shown.of_row(2) == [] and len(shown.of_row(1)) == 1


def test_sft_names_prompt_and_completion(examples):
    prompt, completion = examples("sft")[0].of_row(1)[0].parts
    assert (prompt.name, set(prompt.kinds)) == ("prompt", {CONTEXT})
    assert (completion.name, set(completion.kinds)) == ("completion", {LEARNED})
    assert completion.position == len(prompt.ids)


def test_sft_cuts_the_completion_at_max_length(examples):
    shown, _ = examples("sft", "--max_length", "10")
    prompt, completion = shown.of_row(2)[0].parts
    room = 10 - len(prompt.ids)
    assert kinds(prompt) == "." * len(prompt.ids)
    assert kinds(completion) == "L" * room + "x" * (len(completion.ids) - room) and room < len(completion.ids)
    before, after, _ = shown.tokens_of_rows()
    assert (before[2], after[2]) == (len(prompt.ids) + len(completion.ids), 10)


def test_a_template_and_tokens_from_elsewhere_need_no_weights(examples, tmp_path):
    other = build_tokenizer()
    other.add_tokens(["<extra>"], special_tokens=True)
    other.save_pretrained(tmp_path / "other")
    shown, _ = examples("sft", "--chat_template_path", str(tmp_path / "other"), rows=sft_rows("messages"))
    assert "<extra>" in shown.tokenizer.get_vocab() and shown.of_row(0)[0].parts[0].kept


def test_sft_assistant_only_learns_what_the_assistant_says(examples):
    shown, _ = examples("sft", "--assistant_only_loss", "true", rows=sft_rows("messages"))
    (part,) = shown.of_row(1)[0].parts
    said = [token for token, kind in zip(part.ids, part.kinds, strict=True) if kind == LEARNED]
    assert part.name == "conversation"
    # The chat template's <|im_end|> is learned with each answer.
    answers = [turn["content"] for turn in sft_rows("messages")[1]["messages"] if turn["role"] == "assistant"]
    assert shown.tokenizer.decode(said).replace("\n", "") == "".join(f"{text}<|im_end|>" for text in answers)


def test_a_packed_row_shows_its_examples(examples):
    shown, _ = examples("sft", "--packing", "true", "--max_length", "64", rows=sft_rows("text"))
    (example,) = shown.of_row(0)
    lengths = [len(part.ids) for part in example.parts]
    assert len(lengths) > 1 and lengths == list(shown.prepared[0]["seq_lengths"])
    assert all(kinds(part) == "." + "L" * (len(part.ids) - 1) for part in example.parts)


def test_turns_that_are_learned_separately(examples):
    """Each turn after its own context; a thought is seen in its own turn only."""
    said = [("user", "Sky?"), ("assistant", "It is blue."), ("user", "And the sea?"), ("assistant", "It is green.")]
    rows = [{"messages": [{"role": role, "content": text * 4} for role, text in said]}]
    flags = ("--assistant_only_loss", "true", "--assistant_turns", "separately")
    shown, _ = examples("sft", *flags, rows=rows)
    first, second = shown.of_row(0)[0].parts
    assert [part.name for part in (first, second)] == ["turn 1", "turn 2"] and first.ids == second.ids[
        : len(first.ids)
    ]
    learned = [token for token, kind in zip(second.ids, second.kinds, strict=True) if kind == LEARNED]
    assert shown.tokenizer.decode(learned) == "It is green." * 4 + "<|im_end|>\n"
    text = printed(shown)
    assert "turn 2:" in text and "Alone in a batch (shared_prefix): 1 row of" in text
    assert f"{len(first.ids)} of {len(first.ids) + len(second.ids)} tokens need not be computed" in text
    # The second turn begins beyond the limit: nothing of it is learned.
    cut, _ = examples("sft", *flags, "--max_length", str(len(first.ids)), rows=rows)
    first, second = cut.of_row(0)[0].parts
    assert CUT not in first.kinds and set(second.kinds) == {CUT}


def test_kto_shows_both_rows_of_a_pair_with_their_labels(examples):
    found = examples("kto", rows=color_pairs(4))[0].of_row(3)
    assert [example.parts[1].note for example in found] == ["label True", "label False"]
    assert [example.parts[2].name for example in found] == ["completion of another row"] * 2


def test_a_reward_is_read_at_the_last_token(examples):
    _, chosen, rejected = examples("reward")[0].of_row(0)[0].parts
    assert kinds(chosen) == "." * (len(chosen.ids) - 1) + "L"
    assert chosen.note.endswith(f"position {chosen.position + len(chosen.ids) - 1}") and rejected.kept


def test_a_stream_is_read_as_far_as_it_is_shown(examples):
    shown, _ = examples("dpo", "--dataset_streaming", "true", count=5)
    assert (shown.rows, shown.total) == (5, None)
    assert shown.of_row(4)[0].parts == examples("dpo")[0].of_row(4)[0].parts


# ---- the text


def printed(shown, row=0, limit=160, **console):
    file = io.StringIO()
    show(Console(file=file, width=80, markup=False, **console), Report(shown, row, shown.of_row(row), limit))
    return file.getvalue()


def test_marks_stand_below_their_tokens_where_there_is_no_colour(examples):
    text = printed(examples("dpo", "--max_length", "8")[0])
    lines = text.splitlines()
    at = lines.index("  What color is 0?")
    assert lines[at + 1].startswith("  .") and set(lines[at + 1]) <= {".", " "}
    assert (
        "\x1b[" not in text and "cut off its end by max_length=8" in " ".join(text.split()) and "^~~ learned" in text
    )
    assert all(len(line) <= 80 for line in lines)


def test_colours_take_the_place_of_marks(examples):
    text = printed(examples("dpo")[0], force_terminal=True, color_system="truecolor")
    assert "\x1b[" in text and "^~" not in text


def test_the_layout_and_the_summary(examples):
    pair = {"prompt": "What color is the sea? " * 4, "chosen": " It is blue.", "rejected": " red"}
    shown, _ = examples("dpo", "--per_device_train_batch_size", "2", rows=[pair] * 2)
    text = printed(shown)
    prompt, chosen, rejected = (len(part.ids) for part in shown.of_row(0)[0].parts)
    once = prompt + chosen + rejected
    assert f"Alone in a batch (shared_prefix): 1 row of {once} tokens, the prompt once" in text
    assert f"{prompt} of {once + prompt} tokens need not be computed" in text
    padded = 4 * (prompt + chosen)
    assert f"{2 * once} tokens in all, {1 - 2 * once / padded:.0%} fewer" in " ".join(text.split())
    assert f"Learned: {2 * (chosen + rejected)} of {2 * (once + prompt)} tokens" in text


def test_the_middle_of_a_long_part_is_left_out(examples):
    pair = {"prompt": "a b c d " * 100, "chosen": " blue", "rejected": " red"}
    shown, _ = examples("dpo", rows=[pair])
    count = len(shown.of_row(0)[0].parts[0].ids)
    assert f"... {count - 40} tokens are left out here ..." in printed(shown, limit=40)
    assert "left out here" not in printed(shown, limit=None)


def test_bytes_newlines_and_special_tokens_are_seen():
    tokenizer = build_tokenizer()
    ids = tokenizer("é\n\t<|im_end|>\u200b")["input_ids"]
    shown = TokenTexts(tokenizer).shown(ids, [CONTEXT] * len(ids))
    text = "".join(token.text for token in shown)
    assert text == "⟨C3⟩⟨A9⟩=é⏎⇥<|im_end|>⟨E2⟩⟨80⟩⟨8B⟩=⟨U+200B⟩"
    assert [token.text for token in shown if token.special] == ["<|im_end|>"]
    assert [line.plain for line in token_lines(shown, 40, coloured=True)] == [text[:11], text[11:]]


# ---- the command


def run(capsys, *words):
    try:
        status = main(["preview", *words])
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_command(capsys, model_path, pairs_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["dpo", "--model_name_or_path", model_path, "--dataset_name", str(pairs_file), *CPU, "--row", "3"]
    status, out, _ = run(capsys, *words)
    assert status == 0 and "dpo: row 3" in out and "Rows looked at: 16 of 16, all." in out
    assert "trl-fast validate" in out and {path.name for path in tmp_path.iterdir()} == {pairs_file.name}


def test_a_bad_row_is_the_line_that_training_gives(capsys, model_path, tmp_path):
    rows = [*color_pairs(3), {"prompt": "Why?", "chosen": "", "rejected": " no"}]
    data = write(tmp_path / "bad.jsonl", rows)
    words = ["--model_name_or_path", model_path, "--dataset_name", data, "--output_dir", str(tmp_path / "out"), *CPU]
    status, _, error = run(capsys, "dpo", *words)
    ours = error.strip().splitlines()[-1]
    assert main(["dpo", *words]) == status == 2
    training = capsys.readouterr().err.strip().splitlines()[-1]
    assert ours == training.replace("trl-fast dpo:", "trl-fast preview:") and "row 3" in ours


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "METHOD is missing"),
        (["gropo"], "unknown method 'gropo'; did you mean 'grpo'?"),
        (["dpo", "--row", "99"], "row=99: there are 16 rows here; expected one from 0 to 15"),
        (["dpo", "--rows", "0"], "rows=0: expected a number from 1 on"),
        (["dpo", "--max_lenght", "3"], "did you mean 'max_length'?"),
    ],
)
def test_bad_arguments_are_one_line(words, said, capsys, model_path, pairs_file):
    rest = ["--model_name_or_path", model_path, "--dataset_name", str(pairs_file), *CPU] if words[1:] else []
    status, _, error = run(capsys, *words, *rest)
    assert status == 2 and said in error.strip().splitlines()[-1]
