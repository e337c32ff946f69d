"""From chat files to batches of tokens, and the draft vocabulary."""

from eagle_rpc.data.batches import BatchPlan
from eagle_rpc.data.chats import Chat, ChatFile, ChatWriter, KeptAnswer, Message, content_hash, read_chats
from eagle_rpc.data.dataset import ChatDataset, Example, load_datasets
from eagle_rpc.data.samples import Sample
from eagle_rpc.data.template import ChatTemplate
from eagle_rpc.data.vocab import build_vocab_mapping, count_predicted_tokens

__all__ = [
    "BatchPlan",
    "Chat",
    "ChatDataset",
    "ChatFile",
    "ChatTemplate",
    "ChatWriter",
    "Example",
    "KeptAnswer",
    "Message",
    "Sample",
    "build_vocab_mapping",
    "content_hash",
    "count_predicted_tokens",
    "load_datasets",
    "read_chats",
]
