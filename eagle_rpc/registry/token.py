"""The secret that the registry and its workers share, in a file that only its owner may read."""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from eagle_rpc.errors import AccessRefused, ConfigError

MIN_TOKEN_BYTES = 32
_MAX_FILE_BYTES = 4096


def load_token(path: Path) -> bytes:
    """The token in `path` (`~` is expanded), written in hexadecimal digits.

    Raises `AccessRefused` if group or others may access the file, `ConfigError` if it is absent or holds no token.
    """
    path = path.expanduser()
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(
            f"rpc.token_file must be a file that this process may read, got {path} ({error.strerror}): "
            "who hosts the registry makes it, copy it from there"
        ) from None
    with file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise AccessRefused(
                f"rpc.token_file must be for its owner only (0600), {path} has mode {stat.S_IMODE(mode):04o}"
            )
        text = file.read(_MAX_FILE_BYTES)
    try:
        token = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raise ConfigError(
            f"rpc.token_file must hold hexadecimal digits, {path} holds something else"
        ) from None
    if len(token) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"rpc.token_file must hold at least {MIN_TOKEN_BYTES} bytes, {path} holds {len(token)}"
        )
    return token


def load_or_create_token(path: Path) -> bytes:
    """As `load_token`, and makes the file with a random token if it is absent; directories that it needs are made 0700."""
    path = path.expanduser()
    if not path.exists():
        _make_directories(path.parent)
        # Readers never see half a token, and of two makers one wins.
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with open(
                os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii"
            ) as file:
                file.write(secrets.token_hex(MIN_TOKEN_BYTES) + "\n")
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
        except OSError as error:
            raise ConfigError(
                f"rpc.token_file must be where this process may write, got {path} ({error.strerror})"
            ) from None
        finally:
            draft.unlink(missing_ok=True)
    return load_token(path)


def _make_directories(directory: Path) -> None:
    # The mode of mkdir holds for the last directory only, so parents are made one by one.
    for missing in reversed([one for one in (directory, *directory.parents) if not one.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
