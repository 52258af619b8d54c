"""Tree rows: where tokens lie, what they see, which hidden state predicts what."""

from __future__ import annotations

import pytest
import torch

from rankalign.rows.tree import Forest, Tree, merged, padded_rows, tree_row, tree_tokens

PROMPTS = [[10, 11, 12], [20]]
RESPONSES = [[[1, 2], [], [3]], [[4, 5, 6]]]


def test_a_row_writes_each_prompt_once_and_continues_its_positions():
    rows = tree_row(PROMPTS, RESPONSES)
    assert rows.ids.tolist() == [[10, 11, 12, 1, 20, 4, 5]]  # last tokens of responses predict nothing
    assert rows.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert rows.labels.tolist() == [1, 2, 3, 4, 5, 6]
    assert rows.predictors.tolist() == [2, 3, 2, 4, 5, 6]  # the last prompt token predicts every first token


def test_padded_rows_hold_one_response_each():
    rows = padded_rows(PROMPTS, RESPONSES)
    assert rows.ids.tolist() == [[10, 11, 12, 1], [10, 11, 12, 0], [10, 11, 12, 0], [20, 4, 5, 0]]
    assert rows.labels.tolist() == [1, 2, 3, 4, 5, 6]
    assert rows.predictors.tolist() == [2, 3, 10, 12, 13, 14]
    assert rows.forest is None


def test_tree_tokens_counts_what_a_row_holds():
    rows = tree_row(PROMPTS, RESPONSES)
    counted = [tree_tokens(len(p), [len(r) for r in rs]) for p, rs in zip(PROMPTS, RESPONSES, strict=True)]
    assert counted == [4, 3]
    assert sum(counted) == rows.ids.numel() == rows.forest.size


@pytest.mark.parametrize("window", [None, 1, 2, 3, 100])
def test_the_mask_is_that_of_each_path_on_its_own(window):
    tree = Tree.at(5, 3, [3, 0, 5, 1])
    expected = torch.zeros(9, 9, dtype=torch.bool)
    for start, stop in [(3, 5), (5, 9)]:  # the paths, root to leaf, as indices into the tree
        path = [0, 1, 2, *range(start, stop)]
        for i, query in enumerate(path):
            for j, key in enumerate(path):
                expected[query, key] |= j <= i and (window is None or i - j < window)
    assert torch.equal(tree.mask(window), expected)
    assert tree.pieces == [(5, 14)]
    assert tree.depth == 7


def test_the_bias_of_a_row_keeps_trees_apart():
    forest = Forest((Tree.at(0, 1, [2]), Tree.at(2, 2, [1, 0])))
    bias = forest.bias(torch.float32, torch.device("cpu"))[0, 0]
    low = torch.finfo(torch.float32).min
    assert bias.tolist() == [[0, low, low, low], [0, 0, low, low], [low, low, 0, low], [low, low, 0, 0]]


def test_activity_follows_the_gradient_of_the_log_probs():
    forest = Forest((Tree.at(0, 2, [3, 0, 2, 1]), Tree.at(5, 1, [3])))
    cpu = torch.device("cpu")
    assert forest.active_spans() == [((0, 2), [(2, 4), (4, 5)]), ((5, 6), [(6, 8)])]
    assert forest.active_rows(cpu) is None
    forest.note_gradient(torch.tensor([0.0, 0, 0, 0, -1, 0, 0, 0, 0]))
    assert forest.active == [[False, False, True, False], [False]]
    assert forest.active_spans() == [((0, 2), [(4, 5)])]
    assert forest.active_rows(cpu).tolist() == [0, 1, 4]
    forest.note_gradient(torch.tensor([0.0, 0, 0, 0, 0, 2, 0, 0, 0]))
    assert forest.active_rows(cpu).tolist() == [0, 1]  # a response of one token needs its prompt alone
    forest.note_gradient(torch.zeros(9))
    assert forest.active_rows(cpu).tolist() == []
    forest.note_gradient(torch.ones(9))
    assert forest.active_rows(cpu) is None


def test_merged_joins_neighbours_only():
    assert merged([(0, 2), (2, 5), (6, 7), (7, 9)]) == [(0, 5), (6, 9)]
