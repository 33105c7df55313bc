"""Runs one phase in this process: imports it, waits for its turn, and gives it its device and deadline."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path

import torch

from .facts import Facts
from .kit import Kit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("module")
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments, words = parser.parse_known_args()
    facts = Facts(arguments.facts, arguments.name)
    try:
        module = importlib.import_module(f"benchmarks.gpu_kit.{arguments.module}")
        if hasattr(module, "prepare"):
            module.prepare(torch.device(arguments.device))
        turn = sys.stdin.readline()
        if not turn:  # the supervisor is gone
            return 1
        kit = Kit(torch.device(arguments.device), facts, arguments.tiny, time.monotonic() + float(turn))
        module.run(kit, *([words] if words else []))
    except Exception as error:
        traceback.print_exc()
        facts.skip("phase", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
