"""Chats in packed rows, against written-down cases."""

import torch

from eagle_rpc.supervision.segments import chat_boundaries, chat_starts, positions_from

IDS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])


def test_a_chat_starts_at_the_row_and_wherever_the_id_changes():
    assert chat_starts(IDS).int().tolist() == [[1, 0, 1, 0, 0], [1, 1, 1, 0, 1]]


def test_positions_restart_at_every_chat():
    assert positions_from(chat_starts(IDS)).tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]]


def test_boundaries_never_join_chats_of_two_rows():
    assert chat_boundaries(chat_starts(IDS)).tolist() == [0, 2, 5, 6, 7, 9, 10]
