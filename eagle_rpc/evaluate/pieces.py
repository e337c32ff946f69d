"""A text token by token, each with the guess that it was accepted as."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from eagle_rpc.draft import Chains, TargetText, replay


def pieces_of(
    text: TargetText, chains: Chains, tokenizer: PreTrainedTokenizerBase, num_draft_tokens: int
) -> list[tuple[str, int]]:
    """The words of each token of `text`, and 0 for the target's own or the position of the accepted guess."""
    positions = [0]
    for accepted in replay(chains.num_right, num_draft_tokens):
        positions += [*range(1, accepted + 1), 0]
    # The last draft may reach beyond the end.
    return list(zip(_words(text.token_ids, tokenizer), positions, strict=False))


def _words(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What each token adds to the decoded text; nothing while a character is incomplete.

    A token is decoded after the ones before it, on which its leading blank may depend.
    """
    start = shown = 0
    for end in range(1, len(token_ids) + 1):
        before = str(tokenizer.decode(list(token_ids[start:shown])))
        now = str(tokenizer.decode(list(token_ids[start:end])))
        if now.endswith("\ufffd") and end < len(token_ids):
            yield ""
        else:
            yield now[len(before) :]
            start, shown = shown, end
