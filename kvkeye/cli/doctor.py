"""Checks this installation: versions, kernels, devices, bundled models, settings. Ends with PASS, WARN or FAIL.

WARN: everything works, something is slower or missing. FAIL (exit code 3): something will not work.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from kvkeye.cli import exits
from kvkeye.cli.checks import FAIL, PASS, WARN, Check, all_checks

_ORDER = (PASS, WARN, FAIL)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    checks = all_checks()
    verdict = max((check.status for check in checks), key=_ORDER.index)
    if arguments.json:
        print(json.dumps({"verdict": verdict, "checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            print("\n".join(_lines(check)))
        print(f"\n{verdict}")
    return exits.ENVIRONMENT if verdict == FAIL else exits.OK


def _lines(check: Check) -> list[str]:
    mark = "" if check.status == PASS else check.status
    lines = [f"{mark:<6}{check.name:<26}{check.value}"]
    return lines + ([f"{'':<32}{check.advice}"] if check.advice else [])
