"""``lowrank convert``: an adapter in another format. The base is loaded, so that every claim is checked."""

from __future__ import annotations

import json
from argparse import Namespace

import lowrank
from lowrank.cli.models import load, load_onto


def run(options: Namespace) -> None:
    if options.serving and options.to != "peft":
        raise ValueError("--serving goes with --to peft")
    model = load(options.base, quiet=options.quiet)
    load_onto(model, options.adapter)
    if options.to == "peft":
        said = str(lowrank.export_peft(model, options.out, serving=options.serving))
    elif options.to == "diffusers":
        said = str(lowrank.export_diffusers(model, options.out))
    else:
        lowrank.save_adapter(model, options.out)
        said = f"{options.out}: {lowrank.plan_of(model)!r}"
    print(json.dumps({"out": str(options.out), "format": options.to}) if options.json else said)
