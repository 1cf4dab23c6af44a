"""What README tells users to type, typed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_chain_by_hand(tmp_path):
    (chain,) = [block for block in blocks("sh") if "align sample" in block]
    for folder in ("data", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "align").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m align "$@"\n')
    (scripts / "align").chmod(0o755)
    (scripts / "python").symlink_to(sys.executable)
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    chain = chain.replace("\npython ", f'\n"{sys.executable}" ')
    done = subprocess.run(
        ["sh", "-ec", chain], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| pass@4" in done.stdout
    assert (tmp_path / "pairs.html").exists() and (tmp_path / "referenced.jsonl").exists()


def test_the_python_example(tmp_path, monkeypatch):
    from conftest import random_pairs

    from align.records import write_records

    (example,) = blocks("python")
    write_records(tmp_path / "scored.jsonl", random_pairs(4, vocab_size=300, columns=("ce_scores",)))
    example = example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(ROOT / "data/tiny-arithmetic/model"))
    assert "bf16=True" in example
    monkeypatch.chdir(tmp_path)
    exec(
        example.replace("bf16=True", "bf16=False, use_cpu=True, max_steps=1, save_strategy='no', report_to='none'"), {}
    )


def test_named_files_exist():
    for path in re.findall(r"\b(?:recipes|benchmarks|data|tests)/[\w./-]+\.(?:py|yaml|md|json)\b", README):
        assert (ROOT / path).exists(), path
