"""``python -m lowrank``: the same as the command ``lowrank``."""

from lowrank_cli import main

if __name__ == "__main__":
    raise SystemExit(main())
