"""`bench gpu-micro`: single operations on one card, each beside the published way, and the card's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anchorformer.errors import run_guarded
from bench.gpu.connector import connector
from bench.gpu.selection import selection
from bench.gpu.session import Session, parser
from bench.gpu.tapped_attention import tapped_attention
from bench.gpu.text_attention import text_attention
from bench.gpu.vision import vision

SECTIONS: dict[str, Callable[[Session], None]] = {
    "selection": selection, "tapped_attention": tapped_attention, "text_attention": text_attention,
    "vision": vision, "connector": connector,
}  # fmt: skip
"""What can be measured, in order: what needs no compiler comes first."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("gpu-micro", __doc__)
    options.add_argument("--only", default=",".join(SECTIONS), help="comma-separated (default: %(default)s)")
    parsed = options.parse_args(arguments)
    session = Session("gpu-micro", parsed)
    session.measure_ceilings()
    for name in parsed.only.split(","):
        SECTIONS[name](session)
    session.close()


if __name__ == "__main__":
    run_guarded(main)
