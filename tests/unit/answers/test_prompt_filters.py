"""Reasons against self-made prompts."""

import pytest

from eagle_rpc.answers.prompt_filters import SeenPrompts, fault_of

GOOD = "How do tides work at the coast?"


def fault(text: str, token_ids=range(10), scripts=()) -> str | None:
    marks = ["<|im_start|>user", "[/INST]"]
    return fault_of(text, token_ids, special_ids={99}, marks=marks, min_chars=12, scripts=scripts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("def f(x):\n\treturn x + 1", None),
        ("为什么大海是蓝色的?请告诉我原因", None),
        ("Why [/INST] is the sea blue?", "with marks of the template"),
        ("Why is\x00 the sea blue?", "not printable"),
        ("Why is the sea \ufffd blue?", "not printable"),
        ("Why is\u202e the sea blue?", "not printable"),
        ("Why?", "too short"),
        ("1234567890 + 12345 = ?", "too short"),
    ],
)
def test_a_prompt_is_judged_by_its_text(text: str, reason: str | None):
    assert fault(text) == reason


def test_special_tokens_inside_a_prompt_are_found_by_their_ids():
    assert fault(GOOD, [1, 2, 99, 4]) == "with marks of the template"


def test_a_loop_of_tokens_is_repetitive_and_a_phrase_that_comes_twice_is_not():
    assert fault(GOOD, [1, 2, 3, 4, 5] * 3) == "repetitive"
    assert fault(GOOD, [*range(30), 0, 1, 2, 3, 4]) is None


@pytest.mark.parametrize(
    ("text", "scripts", "kept"),
    [
        (GOOD, ["LATIN"], True),
        ("Où est la bibliothèque, 42 rue Mazarine?", ["LATIN"], True),
        ("Почему море синее и глубокое?", ["LATIN"], False),
        ("Почему море синее и глубокое?", ["CYRILLIC"], True),
        ("What does Почему mean in English?", ["LATIN"], False),
        ("What does Почему mean in English?", ["LATIN", "CYRILLIC"], True),
        ("海はなぜ青いのですか、教えてください", ["CJK", "HIRAGANA"], True),
    ],
)
def test_all_letters_must_be_of_the_chosen_scripts(text: str, scripts: list[str], kept: bool):
    assert fault(text, scripts=scripts) == (None if kept else "in another script")


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("how do  TIDES work, at the coast", "duplicates"),
        ("How do tides work at the coasts?", "near duplicates"),
        ("How do volcanoes work on an island?", None),
        ("海はなぜ青いのですか", None),
    ],
)
def test_equal_and_nearly_equal_prompts_are_kept_once(second: str, reason: str | None):
    seen = SeenPrompts()
    assert seen.add(GOOD) is None
    assert seen.add(second) == reason


def test_a_prompt_that_is_left_out_is_not_remembered():
    seen = SeenPrompts()
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert seen.add(letters) is None
    assert seen.add(letters + "01234") == "near duplicates"
    # Near the second text, but not the first one.
    assert seen.add(letters[10:] + "01234") is None
