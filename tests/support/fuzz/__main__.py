"""Runs `python -m support.fuzz`: cases for some seconds, or one case again."""

from __future__ import annotations

import argparse
import sys
import time

from support.fuzz.runner import TRIALS, Outcome, fuzzing, run_case, table


def main() -> int:
    """Runs what the command line asks for; returns 1 if a case has a fault."""
    parser = argparse.ArgumentParser(prog="python -m support.fuzz", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="first number of every case's line")
    parser.add_argument("--case", help="seed/index of a case to run again")
    parser.add_argument("--op", choices=TRIALS, help="run this op only, in the place of what is drawn")
    with fuzzing():
        return _run(parser.parse_args())


def _run(asked: argparse.Namespace) -> int:
    if asked.case:
        seed, index = map(int, asked.case.split("/"))
        outcome = run_case(seed, index, asked.op)
        print(outcome, f"\n    {outcome.worst:.3f} of what is allowed")
        return bool(outcome.faults)
    outcomes: list[Outcome] = []
    end, said = time.monotonic() + asked.seconds, time.monotonic()
    while time.monotonic() < end:
        outcomes.append(run_case(asked.seed, len(outcomes), asked.op))
        if outcomes[-1].faults:
            print(outcomes[-1], flush=True)
        if time.monotonic() > said + 10:
            said = time.monotonic()
            faults = sum(bool(outcome.faults) for outcome in outcomes)
            print(f"{len(outcomes)} cases, {faults} with faults, {max(0.0, end - said):.0f} s to go", flush=True)
    print(table(outcomes))
    return any(outcome.faults for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
