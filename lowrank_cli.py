"""The command `lowrank`: reads its arguments. The library is imported only once a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

METHODS = "lora rslora lora_fa dora pissa milora olora ailora tlora eva corda lora_ga".split()


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        print(parser.prog, import_module("lowrank").__version__)
        parser.exit()


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="lowrank",
        description="Inspect, compare, convert and merge adapters: those of lowrank, PEFT and diffusers.",
        epilog="Exit codes: 0 done (diff: equal), 1 diff found differences, 2 an error, in one line.",
    )
    root.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    an_adapter = "a folder of lowrank or PEFT, or a LoRA file of diffusers"
    a_model = "folder of a model of transformers or diffusers"

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.add_argument("--json", action="store_true", help="print JSON in place of text")
        added.add_argument("--quiet", action="store_true", help="show no progress bars")
        return added

    inspect = command("inspect", "show the rank, the scaling and the size of ΔW of each adapted weight")
    inspect.add_argument("adapter", type=Path, help=an_adapter)

    diff = command("diff", "compare two adapters, weight by weight")
    diff.add_argument("one", type=Path, help=an_adapter)
    diff.add_argument("other", type=Path, help="likewise")

    verify = command("verify", "check that an adapter is whole; with --base, that it fits that model")
    verify.add_argument("adapter", type=Path, help=an_adapter)
    verify.add_argument("--base", type=Path, help=a_model)

    convert = command(
        "convert", "write an adapter in another format; the base is loaded to check that it fits"
    )
    convert.add_argument("adapter", type=Path, help=an_adapter)
    convert.add_argument("--to", required=True, choices=["peft", "lowrank", "diffusers"])
    convert.add_argument("--base", type=Path, required=True, help=f"{a_model}, which it adapts")
    convert.add_argument("--out", type=Path, required=True, help="a folder; for diffusers a file")
    convert.add_argument(
        "--serving", action="store_true", help="with --to peft: one rank for all, the scaling folded into B"
    )

    merge = command("merge", "add an adapter to a checkpoint, file by file, without loading the model")
    merge.add_argument("base", type=Path, help="folder with safetensors files")
    merge.add_argument("adapter", type=Path, help=an_adapter)
    merge.add_argument("--out", type=Path, required=True, help="a new folder")

    combine = command("combine", "write the weighted sum of adapters as one adapter of lowrank")
    combine.add_argument(
        "adapters", nargs="+", metavar="ADAPTER=WEIGHT", help="an adapter alone has weight 1"
    )
    combine.add_argument("--base", type=Path, required=True, help=f"{a_model}, which they adapt")
    combine.add_argument(
        "--rank", type=int, help="rank of the sum, which is then the best approximation (default: exact)"
    )
    combine.add_argument("--out", type=Path, required=True, help="a folder")

    plan = command("plan", "show which projections of a model get how much rank")
    plan.add_argument("model", type=Path, help="folder of a model of transformers")
    plan.add_argument("--method", choices=METHODS, default="lora", help="a preset (default: %(default)s)")
    plan.add_argument("--rank", type=int, default=8, help="(default: %(default)s)")
    plan.add_argument(
        "--budget", type=int, help="trainable adapter parameters, in place of what the rank would take"
    )
    plan.add_argument(
        "--target", nargs="+", default=["all-linear"], help="roles or names (default: all-linear)"
    )
    plan.add_argument(
        "--data", type=Path, help='JSON lines with "text", for methods that measure (tlora, eva)'
    )
    plan.add_argument(
        "--examples", type=int, default=64, help="how many lines of --data to use (default: %(default)s)"
    )
    plan.add_argument(
        "--tokens", type=int, default=256, help="longest example, in tokens (default: %(default)s)"
    )
    plan.add_argument("--out", type=Path, help="also write the plan to this file, as JSON")

    report = command("report", "write one HTML file about a run: plan, curves, memory, updates, versions")
    report.add_argument(
        "run", type=Path, help="folder that holds an adapter of lowrank and a log (JSON lines)"
    )
    report.add_argument("--log", type=Path, help="the log, where it is elsewhere")
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the file (default: %(default)s)"
    )
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return int(import_module(f"lowrank.cli.{options.command}").run(options) or 0)
    except (ValueError, OSError, ImportError) as error:
        first, *more = str(error).splitlines() or [type(error).__name__]
        print(
            f"lowrank {options.command}: {' '.join([first, *(line.strip() for line in more)])}",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
