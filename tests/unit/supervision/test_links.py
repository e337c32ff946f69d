"""The page on hosts says what a link carries, by the bytes of each encoding."""

from support.documents import ROOT
from support.reporting import table

from eagle_rpc.supervision import ENCODINGS

# An 8B target in bf16 and its draft: hidden size and draft vocabulary.
_EIGHT_BILLION = {"hidden_size": 4096, "draft_vocab_size": 32_000, "dtype_bytes": 2}
_GIGABITS = (1, 10, 25, 100)
_PACE = 70_000  # tokens/s of a target


def test_the_table_of_links_is_that_of_the_encodings():
    rows = []
    for name, encoding in ENCODINGS.items():
        size = encoding.bytes_per_token(**_EIGHT_BILLION)
        carried = [f"{1e9 * rate / 8 / size:,.0f}" for rate in _GIGABITS]
        rows.append((f"`{name}`", f"{size:,.0f}", *carried, f"{8 * size * _PACE / 1e9:.1f}"))
    links = [f"{rate} Gbit/s" for rate in _GIGABITS]
    header = ("encoding", "bytes a token", *links, f"Gbit/s for {_PACE:,} tokens/s")
    assert table(header, rows) in (ROOT / "docs/how_to/two_hosts.md").read_text()
