"""Boot the stock kernel many times in a row; every boot must end with the command's output and exit status.

    python bench/boots.py [--count 50] [--engine unicorn|kvm|adaptive] [--kernel 6.1]

Prints the failures, and how long the boots took; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

DEADLINE = 120  # seconds; a boot takes ten


def boot(engine: str, kernel: str) -> tuple[float, str]:
    """Seconds to the command, and what went wrong."""
    line = [sys.executable, "-m", "xenolith", "run", "--engine", engine, "--kernel", kernel, "--stats"]
    try:
        done = subprocess.run([*line, "--", "sh", "-c", "echo up; exit 7"], capture_output=True, timeout=DEADLINE)
    except subprocess.TimeoutExpired as hung:
        return 0.0, f"no end after {DEADLINE} s: {(hung.stderr or b'').decode(errors='replace')[-2000:]}"
    if (done.returncode, done.stdout) != (7, b"up\n"):
        return 0.0, f"exit status {done.returncode}, output {done.stdout!r}: {done.stderr.decode(errors='replace')}"
    return float(json.loads(done.stderr)["boot_seconds"]), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--kernel", default="6.1")
    arguments = parser.parse_args()
    times = []
    for number in range(arguments.count):
        seconds, failure = boot(arguments.engine, arguments.kernel)
        if failure:
            print(f"boot {number + 1}: {failure}")
        else:
            times.append(seconds)
    print(f"{arguments.engine}: {len(times)} of {arguments.count} boots of {arguments.kernel} succeeded", end="")
    if times:
        print(f"; boot to shell {min(times):.1f}-{max(times):.1f} s, median {statistics.median(times):.1f}", end="")
    print()
    sys.exit(len(times) < arguments.count)


if __name__ == "__main__":
    main()
