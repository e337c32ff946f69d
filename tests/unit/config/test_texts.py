import pytest

from eagle_rpc.config.texts import is_name, parse_address, parse_pair
from eagle_rpc.errors import ConfigError


@pytest.mark.parametrize("address", [("here", 1), ("10.0.0.5", 29711), ("a-host.of.mine", 65535)])
def test_an_address_is_host_and_port(address: tuple[str, int]):
    host, port = address
    assert parse_address(f"{host}:{port}") == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "here",
        "here:",
        ":1",
        "here:0",
        "here:65536",
        "here:70000",
        "here:-1",
        "here:1x",
        "he re:1",
        "::1:1",
        "here:\u0661",
    ],
)
def test_anything_else_is_none(text: str):
    with pytest.raises(ConfigError, match=r"rpc\.registry must be host:port with a port in 1\.\.65535, got "):
        parse_address(text)


def test_a_name_is_a_short_line():
    assert all(is_name(text) for text in ("", "smollm2", "a run of \u00fc", "n" * 128))
    assert not any(is_name(value) for value in ("n" * 129, "two\nlines", "a\x1b[2J", None, 7))


def test_a_pair_is_two_positive_numbers():
    assert parse_pair("4x2048") == (4, 2048)
    for text in ("", "4", "0x1", "1x0", "1x2x3", "1 x 2"):
        with pytest.raises(ConfigError, match=r"two positive numbers as in 4x2048, got"):
            parse_pair(text)
