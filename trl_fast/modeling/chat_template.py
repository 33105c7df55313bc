"""Another model's chat template on this one's tokenizer and vocabulary."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Gives a tokenizer the chat template, the added tokens and the end token of another, and makes room in the model.

    The embeddings grow to the vocabulary, rounded up to a multiple of resize_to_multiple_of; tokens <extra_id_0>, ...
    fill the tokenizer up to them. Model and tokenizer are changed in place.

    Returns:
        The model, the tokenizer, and the ids of the tokens that are new in it.

    Raises:
        OSError: there is no tokenizer at source_tokenizer_path.
        ValueError: it has no chat template.
    """
    source = AutoTokenizer.from_pretrained(source_tokenizer_path)
    tokenizer.chat_template = source.get_chat_template()
    vocabulary = tokenizer.get_vocab()
    new = [token for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    tokenizer.add_tokens(new)
    tokenizer.eos_token = source.eos_token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    # The length of the vocabulary, since tokenizers differ in what they count as vocab_size.
    embeddings = model.resize_token_embeddings(len(tokenizer.get_vocab()), pad_to_multiple_of=resize_to_multiple_of)
    number = 0
    while len(tokenizer.get_vocab()) < embeddings.num_embeddings:
        filler = AddedToken(f"<extra_id_{number}>")
        number += 1
        if tokenizer.add_tokens(filler):
            new.append(filler)
    return model, tokenizer, tokenizer.convert_tokens_to_ids([token.content for token in new])
