"""Fuzzing steered by coverage: Atheris (libFuzzer) mutates the bytes from which hypothesis draws a target's inputs.

    python tests/fuzz_coverage.py verify --seconds 60 --corpus runs/corpus

An input that reaches new branches of `align` is kept and mutated further. A bug ends the run with its traceback and exit code
77, or 1 for one that ended in the interpreter; the input lies in the folder of the corpus, named `crash-…`. Needs the extra `fuzz`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

#: Longest input, in bytes: what hypothesis draws the largest files from.
LONGEST = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a key of fuzz_targets.TARGETS")
    parser.add_argument("--seconds", type=int, default=60, help="how long")
    parser.add_argument("--runs", type=int, default=-1, help="at most so many inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--corpus", help="folder where inputs that reached something new are kept; a temporary one by default"
    )
    args = parser.parse_args()

    import atheris

    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["align"]):
        import fuzz_cli  # noqa: F401 - registers the commands' targets
        import fuzz_settings  # noqa: F401
        from fuzz_targets import TARGETS, attempt

        for module in ("cli", "config", "demonstrations", "evaluate", "export", "mix_stage", "models", "pair", "preferences", "problems",
                       "rac", "report", "sample", "select", "stages", "tokens", "trace", "verify", "vocabulary"):  # fmt: skip
            __import__(f"align.{module}")
    from hypothesis import HealthCheck, given, settings

    if args.target not in TARGETS:
        parser.error(f"no target {args.target!r}; there are {', '.join(TARGETS)}")

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TARGETS[args.target].inputs)
    def run(value):
        attempt(args.target, value)

    corpus = Path(args.corpus or tempfile.mkdtemp(prefix="fuzz-corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    flags = [f"-max_total_time={args.seconds}", f"-runs={args.runs}", f"-seed={args.seed}", f"-max_len={LONGEST}", "-len_control=0",
             f"-artifact_prefix={corpus}/", "-rss_limit_mb=8192", "-print_final_stats=1"]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags, str(corpus)], run.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
