"""Runs of words that rows share with evaluation problems, and equal rows; on texts short enough to count by hand."""

import pytest

from ibft.data.overlap import (
    Overlap,
    Source,
    build_index,
    find_duplicates,
    find_overlaps,
    strings_of,
    words_of,
)

TASK = "Return the sum of all odd numbers that stand at even places"  # 12 words
PROMPT, SOLUTION = Source("s", "p", "prompt"), Source("s", "p", "solution")


def overlaps(rows, texts, n=10, **more):
    return find_overlaps(rows, build_index(texts, n, **more))


def numbered(count, text, suite="s"):
    """So many problems that begin with the text and go on each in its own words."""
    return [
        (Source(suite, f"p{i}", "prompt"), f"{text} " + " ".join(f"{suite}{i}_{j}" for j in range(12)))
        for i in range(count)
    ]


def test_words_are_runs_of_letters_digits_and_underscores_in_lower_case():
    assert words_of("Return a[i_1] + 3.5,\n\t'Größe'!") == ["return", "a", "i_1", "3", "5", "größe"]
    assert words_of(" .,;()\n") == []


def test_a_row_that_shares_n_words_overlaps_and_one_that_shares_n_minus_1_does_not():
    ten = "the sum of all odd numbers that stand at even"
    assert overlaps([f"x {ten} y"], [(PROMPT, TASK)]) == [Overlap(0, PROMPT, ten)]
    assert overlaps([f"x {ten.removesuffix(' even')} y"], [(PROMPT, TASK)]) == []
    assert overlaps([f"x {ten.replace('odd', 'odd x')} y"], [(PROMPT, TASK)]) == []


def test_case_punctuation_and_layout_make_no_difference():
    code = "    for i in range(2, n):\n        if n % i == 0:\n            return False\n    return True\n"
    row = 'FOR I IN RANGE( 2,n ): IF n%i==0: {RETURN FALSE};"Return"\n\n\ttrue'
    whole = "for i in range 2 n if n i 0 return false return true"
    assert overlaps([row], [(SOLUTION, code)], n=14) == [Overlap(0, SOLUTION, whole)]


def test_the_first_shared_words_stand_for_all_of_a_problems_text():
    found = overlaps([TASK + ". " + TASK], [(PROMPT, TASK)])
    assert found == [Overlap(0, PROMPT, "return the sum of all odd numbers that stand at")]


def test_prompt_and_solution_are_told_apart_and_rows_counted_from_0():
    solution = "return sum(x for i, x in enumerate(numbers) if i % 2 == 0)"
    texts = [(PROMPT, TASK), (SOLUTION, solution)]
    found = overlaps(iter(["clean", solution, TASK, f"{solution} {TASK}"]), texts)
    assert [(overlap.row, overlap.source.where) for overlap in found] == [
        (1, "solution"), (2, "prompt"), (3, "solution"), (3, "prompt"),
    ]  # fmt: skip


def test_a_shorter_text_is_looked_for_whole():
    eight = "sort the words by their length then alphabetically"
    source = [(PROMPT, eight)]
    assert overlaps([f"Please {eight}."], source) == [Overlap(0, PROMPT, eight)]
    assert overlaps([eight], source) == [Overlap(0, PROMPT, eight)]
    assert overlaps([eight.removesuffix(" alphabetically"), eight.replace("then", "and then")], source) == []


def test_a_text_of_too_few_words_is_not_looked_for_but_reported():
    seven = "sort the words by their length now"
    index = build_index([(PROMPT, seven), (SOLUTION, seven + " please")], 10)
    assert (index.too_short, index.too_common) == ([PROMPT], [])
    assert find_overlaps([seven], index) == []
    lower = build_index([(PROMPT, seven)], 10, least=7)
    assert lower.too_short == []
    assert find_overlaps([seven], lower) == [Overlap(0, PROMPT, seven)]


def test_a_source_of_several_texts_is_too_short_only_if_all_are():
    index = build_index([(PROMPT, "too short"), (PROMPT, TASK), (PROMPT, ""), (SOLUTION, ""), (SOLUTION, "x")], 10)
    assert index.too_short == [SOLUTION]


def test_short_and_long_texts_that_begin_alike_are_both_found():
    eight = " ".join(words_of(TASK)[:8])
    texts = [(PROMPT, TASK), (SOLUTION, eight)]
    assert {(o.source, o.words) for o in overlaps([TASK], texts)} == {
        (SOLUTION, eight), (PROMPT, "return the sum of all odd numbers that stand at"),
    }  # fmt: skip
    assert overlaps([eight], texts) == [Overlap(0, SOLUTION, eight)]


def test_words_that_many_problems_share_contaminate_nothing():
    boilerplate = "write a function that takes a list and returns the"  # 10 words
    assert {o.source.problem for o in overlaps([boilerplate], numbered(3, boilerplate))} == {"p0", "p1", "p2"}
    assert overlaps([boilerplate], numbered(4, boilerplate)) == []
    assert len(overlaps([boilerplate], numbered(4, boilerplate), most=4)) == 4
    rest = " ".join(f"s2_{j}" for j in range(12))
    assert [o.source.problem for o in overlaps([f"{boilerplate} {rest}"], numbered(4, boilerplate))] == ["p2"]


def test_suites_that_hold_the_same_problems_are_counted_apart():
    boilerplate = "write a function that takes a list and returns the"
    texts = numbered(3, boilerplate, "a") + numbered(2, boilerplate, "b") + numbered(4, boilerplate, "c")
    assert [o.source.suite for o in overlaps([boilerplate], texts)] == ["a", "a", "a", "b", "b"]


def test_a_problem_whose_prompt_and_solution_are_alike_counts_once():
    texts = [(Source("s", f"p{i}", where), TASK) for i in range(3) for where in ("prompt", "solution")]
    assert len(overlaps([TASK], texts)) == 6


def test_a_text_of_which_all_is_common_is_reported():
    index = build_index([(Source("s", f"p{i}", "prompt"), TASK) for i in range(4)], 10)
    assert (len(index.too_common), index.too_short, index.sources) == (4, [], {})


def test_n_below_the_shortest_text_is_refused():
    with pytest.raises(ValueError, match="n: got 7, expected 8 or more"):
        build_index([], 7)


def test_equal_rows_are_grouped_whatever_the_order_of_their_keys():
    rows = [
        {"a": "x", "b": [1, {"c": "d"}]},
        {"a": "y"},
        {"b": [1, {"c": "d"}], "a": "x"},
        {"a": "Y"},
        {"a": "y"},
        {"a": "x", "b": [{"c": "d"}, 1]},
        {"a": "y"},
        {"a": "y", "b": None},
    ]
    assert find_duplicates(rows) == [[0, 2], [1, 4, 6]]
    assert find_duplicates(rows[:2]) == []


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def test_rows_are_equal_that_say_the_same_whatever_else_they_hold():
    talk = (("user", "q"), ("assistant", "a"))
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"id": 0, "instruction": "q", "output": "a"},
        {"id": 1, "instruction": "q", "input": "", "output": "a"},
        {"id": 2, "instruction": "q", "output": "b"},
        {"id": 3, "prompt": "q", "completion": "a", "source": "s"},
        {"id": 4, "instruction": "q", "input": "more", "output": "a"},
        chat(*talk, id=5),
        {"id": 6, "conversations": sharegpt},
        chat(*talk, ("user", "r"), ("assistant", "a"), id=7),
        {"id": 8, "text": "q"},
        {"id": 9, "text": "q"},
        {"id": 10, "input_ids": [1, 2], "labels": [-100, 2]},
        {"id": 11, "input_ids": [1, 2], "labels": [-100, 2]},
        {"id": 12, "input_ids": [1, 2]},
        {"id": 13, "instruction": "q", "output": None},
        {"id": 14, "instruction": "q", "output": None},
    ]
    assert find_duplicates(rows) == [[0, 1, 3], [5, 6], [8, 9], [10, 11]]
    assert find_duplicates(rows, whole=True) == []
    assert find_duplicates([rows[0], rows[2], dict(reversed(rows[0].items()))], whole=True) == [[0, 2]]


def test_rows_are_compared_by_the_fields_that_are_named():
    rows = [
        {"text": "head", "q": "1", "a": "2", "id": 0},
        {"text": "head", "q": "1", "a": "3", "id": 1},
        {"text": "tail", "q": "1", "a": "2", "id": 2},
    ]
    assert find_duplicates(rows) == [[0, 1]]
    assert find_duplicates(rows, {"instruction": "q", "output": "a"}) == [[0, 2]]


def test_all_text_of_a_row_is_read_however_deep():
    row = {"messages": [{"role": "user", "content": "hi", "n": 3}, {"parts": [{"text": "deep"}]}], "x": None, "y": "z"}
    assert list(strings_of(row)) == ["user", "hi", "deep", "z"]
