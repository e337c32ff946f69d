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
    """The token in `path` (`~` is expanded), which holds it in hexadecimal digits.

    Raises `AccessRefused` if group or others may access the file, `ConfigError` if it is absent or holds no
    token.
    """
    path = path.expanduser()
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(
            f"rpc.token_file must be a file that this process may read, got {path} ({error.strerror}): "
            "the registry's host makes it, copy it from there"
        ) from None
    with file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            rule = "rpc.token_file must be for its owner only (0600)"
            raise AccessRefused(f"{rule}, {path} has mode {mode:04o}")
        text = file.read(_MAX_FILE_BYTES)
    try:
        token = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        rule = "rpc.token_file must hold hexadecimal digits"
        raise ConfigError(f"{rule}, {path} holds something else") from None
    if len(token) < MIN_TOKEN_BYTES:
        rule = f"rpc.token_file must hold at least {MIN_TOKEN_BYTES} bytes"
        raise ConfigError(f"{rule}, {path} holds {len(token)}")
    return token


def load_or_create_token(path: Path) -> bytes:
    """As `load_token`, but makes an absent file with a random token, and its directories with mode 0700."""
    path = path.expanduser()
    if not path.exists():
        # A link of a complete file: readers never see half a token, and of two makers the first one counts.
        fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            # The mode of mkdir holds for the last directory only, so each one is made by itself.
            for missing in reversed([one for one in path.parents if not one.exists()]):
                missing.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(MIN_TOKEN_BYTES) + "\n")
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
        except OSError as error:
            rule = "rpc.token_file must be where this process may write"
            raise ConfigError(f"{rule}, got {path} ({error.strerror})") from None
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
    return load_token(path)
