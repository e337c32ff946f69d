"""From chat files to batches of tokens, and the draft vocabulary."""

from eagle_rpc.data.batches import BatchPlan
from eagle_rpc.data.chats import Chat, KeptAnswer, Message, content_hash
from eagle_rpc.data.dataset import ChatDataset, Example
from eagle_rpc.data.records import ChatFile, iter_chats, parse_chat, read_chats
from eagle_rpc.data.samples import Sample
from eagle_rpc.data.sources import read_records, training_sources
from eagle_rpc.data.template import ChatTemplate
from eagle_rpc.data.token_cache import datasets_of, load_data
from eagle_rpc.data.vocab import build_vocab_mapping, coverage, coverage_by_size

__all__ = [
    "BatchPlan",
    "Chat",
    "ChatDataset",
    "ChatFile",
    "ChatTemplate",
    "Example",
    "KeptAnswer",
    "Message",
    "Sample",
    "build_vocab_mapping",
    "content_hash",
    "coverage",
    "coverage_by_size",
    "datasets_of",
    "iter_chats",
    "load_data",
    "parse_chat",
    "read_chats",
    "read_records",
    "training_sources",
]
