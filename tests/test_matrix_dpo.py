"""TRL's `DPOTrainer` and ours on the same arguments, setting by setting; see `differential`."""

import pytest
from datasets import Dataset
from differential import Case, check
from trl import DPOConfig, DPOTrainer

from align import TokenDPOConfig, TokenDPOTrainer


def text_rows():
    return Dataset.from_list(
        [
            {
                "prompt": f"Question: {i} + {i} = ?\nAnswer:",
                "chosen": f" it is {2 * i}",
                "rejected": f" {i}" * (i % 4 + 1),
            }
            for i in range(12)
        ]
    )


CASES = [Case("plain")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_as_trl(case, tmp_path):
    check(case, (DPOTrainer, DPOConfig), (TokenDPOTrainer, TokenDPOConfig), tmp_path, text_rows, trl_completions=True)
