"""The prefix-shared layout: every slot sees what it would see in its own row, and nothing of another pair."""

from collections import Counter

import pytest
import torch
from conftest import tiny_llama

from align.packing import fill_rows, lay_out_pairs, pair_slots, shared_tokens

#: Prompt, chosen, rejected: sides that part at once, late, never but for their ends, with completions of one token, and with
#: a prompt of one token.
PAIRS = [
    ([5, 6, 7], [8, 9, 10], [11, 12]), ([5], [6], [7]), ([5, 6], [7, 8, 9, 10], [7, 8, 11]), ([9, 8], [7], [7, 6, 5]),
    ([20, 21, 22, 23, 24], [25, 26, 27, 28, 29, 30], [31]), ([3, 4], [5, 6], [5, 6]),
]  # fmt: skip


def padded(pairs, left=False):
    """A batch as TRL's collator makes it: ids, attention mask, labels."""
    rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    width = max(len(p) + len(c) for p, c in rows)
    ids, mask, labels = (torch.full((len(rows), width), value) for value in (0, 0, -100))
    for i, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        start = width - length if left else 0
        ids[i, start : start + length] = torch.tensor(prompt + completion)
        mask[i, start : start + length] = 1
        labels[i, start + len(prompt) : start + length] = torch.tensor(completion)
    return ids, mask, labels


def oracle_mask(layout, window=10**6):
    """Slot by slot: j is seen from i if both belong to one pair, j is no later, j lies in the trunk or in i's branch, and fewer
    than `window` positions back."""
    rows, width = layout.pair.shape
    seen = torch.zeros(rows, 1, width, width, dtype=torch.bool)
    for r in range(rows):
        for i in range(width):
            for j in range(i + 1):
                pair, other = int(layout.pair[r, i]), int(layout.pair[r, j])
                branches = int(layout.branch[r, j]) in (0, int(layout.branch[r, i]))
                near = int(layout.position_ids[r, i]) - int(layout.position_ids[r, j]) < window
                seen[r, 0, i, j] = i == j or (pair == other and pair >= 0 and branches and near)
    return seen


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("most", [None, 1, 12])
@pytest.mark.parametrize("multiple", [1, 8])
def test_each_slot_sees_its_own_row(one_row, most, multiple):
    """The tokens a slot attends to, in order of position, are the row that it stands in, up to itself."""
    ids, mask, labels = padded(PAIRS)
    layouts = lay_out_pairs(ids, mask, labels, most=most, one_row=one_row, multiple=multiple)
    found = torch.zeros(labels[:, 1:].shape, dtype=torch.bool).flatten()
    width = labels.shape[1] - 1
    for layout in layouts:
        assert layout.input_ids.shape[1] % multiple == 0
        seen = layout.mask()
        assert torch.equal(seen, oracle_mask(layout))
        for place, source in zip(layout.places.tolist(), layout.sources.tolist(), strict=True):
            row, column = divmod(place, width)
            r, slot = divmod(int(layout.labelled[source]), layout.pair.shape[1])
            visible = seen[r, 0, slot].nonzero()[:, 0]
            order = layout.position_ids[r, visible]
            assert order.tolist() == list(range(len(order)))  # each position once, none missing
            assert layout.input_ids[r, visible].tolist() == ids[row, : column + 1].tolist()
            assert layout.targets[source] == ids[row, column + 1] == labels[row, column + 1]
            assert not found[place]
            found[place] = True
    assert torch.equal(found.view(labels[:, 1:].shape), labels[:, 1:] != -100)


def test_slots_are_counted_beforehand():
    ids, mask, labels = padded(PAIRS)
    for i, (prompt, chosen, rejected) in enumerate(PAIRS):
        (layout,) = lay_out_pairs(ids[[i, i + 6]], mask[[i, i + 6]], labels[[i, i + 6]])
        slots = pair_slots(prompt + chosen, prompt + rejected, len(prompt))
        assert layout.pair.shape == (1, slots)
        assert slots == len(prompt) - 1 + len(chosen) + len(rejected) - (len(chosen) == 0) - (len(rejected) == 0)
    assert shared_tokens([1, 2, 3], [1, 2, 4], 3) == 2
    assert shared_tokens([1, 2, 3], [1, 2, 3], 3) == 2  # a row's last token predicts nothing
    assert shared_tokens([1, 2, 3], [1, 2, 4], 1) == 1  # completions that begin alike are not shared
    assert shared_tokens([1], [1], 1) == 0


def test_truncated_rows_share_nothing_that_differs():
    """`keep_end` leaves rows of a pair with other beginnings, or without a prompt at all."""
    ids = torch.tensor([[6, 7, 8, 9], [7, 20, 21, 22], [5, 6, 7, 30], [20, 21, 22, 23]])
    labels = ids.clone()
    labels[0, :2] = labels[1, :1] = labels[2, :3] = -100
    (layout,) = lay_out_pairs(ids, torch.ones_like(ids), labels)
    assert (layout.branch > 0).all()
    assert len(layout.places) == int((labels[:, 1:] != -100).sum())


def test_padding_on_the_left_is_the_same_batch():
    right, left = ((lay_out_pairs(*padded(PAIRS, left)))[0] for left in (False, True))
    for name in ("input_ids", "position_ids", "pair", "branch", "labelled", "targets"):
        assert torch.equal(getattr(right, name), getattr(left, name)), name
    assert not torch.equal(right.places, left.places)


def test_rows_are_filled_without_waste():
    sizes = [7, 5, 3, 3, 2, 8, 1, 9]
    rows = fill_rows(sizes, 10)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 4  # 38 slots


def test_block_mask_is_the_mask():
    from torch.nn.attention.flex_attention import create_mask

    layout = lay_out_pairs(*padded(PAIRS), one_row=True, multiple=128)[0]
    rows, width = layout.pair.shape
    block = layout.block_mask()
    assert torch.equal(create_mask(block.mask_mod, rows, 1, width, width, device="cpu"), layout.mask())
    windowed = create_mask(layout.block_mask(3).mask_mod, rows, 1, width, width, device="cpu")
    assert torch.equal(windowed, layout.mask(3)) and not torch.equal(windowed, layout.mask())


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_a_window_is_a_distance_of_positions(window):
    """As transformers has it: a slot sees itself and window - 1 positions before it, wherever their slots lie."""
    layout = lay_out_pairs(*padded(PAIRS), one_row=True)[0]
    mask = layout.mask(window)
    assert torch.equal(mask, oracle_mask(layout, window))
    for row, slot in (layout.pair >= 0).nonzero().tolist():
        position = int(layout.position_ids[row, slot])
        seen = layout.position_ids[row, mask[row, 0, slot]].tolist()
        assert seen == list(range(max(0, position - window + 1), position + 1))


def test_every_token_of_every_row_is_counted_where_a_router_counts_them():
    """With slots for the rows' last tokens, what each slot stands for adds up to the batch's real tokens."""
    ids, mask, labels = padded(PAIRS)
    for most in (None, 12):
        layouts = lay_out_pairs(ids, mask, labels, most=most, whole=True, multiple=8)
        found = Counter()
        for layout in layouts:
            for token, count in zip(
                layout.input_ids.flatten().tolist(), layout.counts().flatten().tolist(), strict=True
            ):
                found[token] += count
        assert +found == Counter(ids[mask != 0].tolist())
        assert sum(int((layout.pair >= 0).sum()) for layout in layouts) == sum(
            pair_slots(p + c, p + r, len(p)) + 2 for p, c, r in PAIRS
        )
        seen = sum(len(layout.places) for layout in layouts)
        assert seen == int((labels[:, 1:] != -100).sum())  # no more is scored


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pair_never_leaks_into_another(attention):
    """Any token of one pair changed: every other pair's logits are the same to the last bit."""
    model = tiny_llama(attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    pairs = [
        tuple(torch.randint(3, 390, (n,), generator=generator).tolist() for n in (4 + i % 3, 2 + i, 6 - i))
        for i in range(5)
    ]
    ids, mask, labels = padded(pairs)

    def logits(ids):
        layout = lay_out_pairs(ids, mask, labels.where(labels == -100, ids), one_row=True)[0]  # all pairs in one row
        bias = torch.zeros(layout.mask().shape).masked_fill(~layout.mask(), torch.finfo(torch.float32).min)
        with torch.no_grad():
            out = model(input_ids=layout.input_ids, position_ids=layout.position_ids, attention_mask=bias).logits[0]
        return {pair: out[layout.pair[0] == pair] for pair in range(len(pairs))}

    before = logits(ids)
    for pair in range(len(pairs)):
        for row in (pair, pair + len(pairs)):
            for column in range(int(mask[row].sum()) - 1):
                changed = ids.clone()
                prompt = len(pairs[pair][0])
                rows = [pair, pair + len(pairs)] if column < prompt else [row]
                # Any token, also the one that the other side has there: completions may begin alike.
                for token in {395, int(ids[(row + len(pairs)) % (2 * len(pairs)), column])} - {int(ids[row, column])}:
                    changed[rows, column] = token
                    after = logits(changed)
                    assert all(torch.equal(after[other], before[other]) for other in before if other != pair)
                    assert not torch.equal(after[pair], before[pair])
