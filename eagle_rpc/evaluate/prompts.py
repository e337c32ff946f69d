"""Prompts of an evaluation, read from a file of chats."""

from eagle_rpc.config import Config
from eagle_rpc.data import ChatTemplate, read_chats


def read_prompts(config: Config, template: ChatTemplate) -> list[list[int]]:
    """Token ids of `evaluate.num_prompts` chats, each up to the start of the answer to its last user turn."""
    chats = read_chats(config.evaluate.prompts, on_error=config.data.on_error, needed_role="user").chats
    prompts = []
    for chat in chats[: config.evaluate.num_prompts]:
        last = max(index for index, message in enumerate(chat.messages) if message.role == "user")
        prompts.append(template.prompt_ids(chat.messages[: last + 1]))
    return prompts
