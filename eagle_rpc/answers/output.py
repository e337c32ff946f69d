"""The file of regenerated chats: which prompts are in it, and whether its answers are of the same settings.

A line is a chat with three more keys: `prompt`, a hash of its system and user turns; `settings`, all that its
answers depend on; `truncated`, whether the last answer was cut, so that no end of turn is learned from it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from eagle_rpc.config import Config
from eagle_rpc.errors import ConfigError


def answer_settings(config: Config, fingerprint: str) -> dict[str, Any]:
    """All that an answer depends on besides its prompt; `fingerprint`: of the target's weights."""
    template = config.data.chat_template
    return {
        "target": fingerprint,
        "chat_template": template and hashlib.sha256(Path(template).read_bytes()).hexdigest()[:16],
        "max_new_tokens": config.regenerate.max_new_tokens,
        "temperature": config.regenerate.temperature,
        "seed": config.run.seed if config.regenerate.temperature > 0 else None,
    }


def finished_prompts(output: str | Path, settings: dict[str, Any]) -> set[str]:
    """Hashes of the prompts that are in the file.

    Raises `ConfigError` if a line is not a regenerated chat, or if its answers were made with other settings.
    """
    prompts = set()
    with Path(output).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                prompt, found = record["prompt"], record["settings"]
            except (ValueError, KeyError, TypeError) as error:
                rule = "regenerate.output must be absent or written by this job"
                raise ConfigError(f"{rule}, got {output} with a foreign line {number}") from error
            changed = {name: value for name, value in settings.items() if found.get(name) != value}
            if changed:
                changes = "; ".join(
                    f"{name} {found.get(name)}, now {value}" for name, value in changed.items()
                )
                rule = "regenerate.output must have answers of the same settings"
                raise ConfigError(
                    f"{rule}, got {output} with {changes}: name another file or remove this one"
                )
            prompts.add(prompt)
    return prompts
