"""``lowrank verify``: is an adapter whole, and does it fit a base?"""

from __future__ import annotations

import json
from argparse import Namespace

from lowrank.cli.models import load, load_onto
from lowrank.cli.saved import read


def run(options: Namespace) -> None:
    saved = read(options.adapter)
    if options.base is not None:
        load_onto(load(options.base, quiet=options.quiet), options.adapter)
    fits = "" if options.base is None else f" and fits {options.base}"
    if options.json:
        print(json.dumps({"whole": True, "format": saved.format, "base": options.base and str(options.base)}))
    else:
        print(f"{options.adapter} is whole ({saved.format}, {len(saved.updates)} projections){fits}")
