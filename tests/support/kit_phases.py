"""Phases of the GPU kit that go wrong, each in a way of its own."""

from __future__ import annotations

import os
import time

from benchmarks.gpu_kit.phase_context import Kit


def run(kit: Kit, words: list[str]) -> None:
    kit.facts.add("begun", words=words)
    match words[0]:
        case "raise":
            raise RuntimeError("an illegal memory access\nand more")
        case "crash":
            os._exit(3)
        case "hang":
            time.sleep(3600)
    kit.facts.add("ended")
