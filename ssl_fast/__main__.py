"""The command line: ``python -m ssl_fast demo`` and ``python -m ssl_fast config``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ssl_fast.demo import cli

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the process's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ssl_fast", description="Fast self-supervised losses for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="pretrain on digits with ssl_fast's loss and with plain torch's, and compare the two",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cli.add_arguments(demo)
    commands.add_parser("config", help="print versions, instruction sets and backends in use")
    options = parser.parse_args(arguments)
    if options.command == "config":
        import ssl_fast

        ssl_fast.show_config()
        return 0
    return cli.run(options)


if __name__ == "__main__":
    raise SystemExit(main())
