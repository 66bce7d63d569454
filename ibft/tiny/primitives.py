"""The building blocks of the tiny tasks: families of small functions, each `filter | map | fold` over one iterable.

A task is one filter, one map and one fold of a family. Every block carries its English in two moods, since the corpus
of the base model and the fine-tuning tasks present the same functions differently:

    noun   "the squares of {items}"        used in a description: "the sum of the squares of the even numbers"
    step   "square each one"               used in an order: "keep the even numbers, square each one, then add them up"

and its Python, where `{v}` is the loop variable, `{it}` the iterable, `{e}` the mapped element, `{if_}` the optional
` if condition` of a comprehension. Blocks whose composition means the same as another (squares, then a count) are not
excluded here: the generator drops them by their behaviour.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Filter:
    """Which elements count; `cond` is empty where all do."""

    key: str
    nouns: tuple[str, ...]
    steps: tuple[str, ...]
    cond: str = ""


@dataclass(frozen=True)
class Map:
    """What becomes of one element; in keyed families, the key by which it is sorted or indexed."""

    key: str
    nouns: tuple[str, ...]
    steps: tuple[str, ...]
    expr: str
    gives: str = "int"


@dataclass(frozen=True)
class Fold:
    """How the elements are brought together.

    `code` is the one-line form (the reference solution's, where there is one); `loop` is (start, one step, result).
    """

    key: str
    nouns: tuple[str, ...]
    steps: tuple[str, ...]
    code: str = ""
    loop: tuple[str, ...] = ()
    takes: str = "any"


@dataclass(frozen=True)
class Family:
    """One kind of task: its argument, its blocks, and the inputs on which its functions are compared."""

    name: str
    args: tuple[str, ...]
    variables: tuple[str, ...]
    given: tuple[str, ...]
    place: str
    iterable: str
    probe: str
    filters: tuple[Filter, ...]
    maps: tuple[Map, ...]
    folds: tuple[Fold, ...]


def _numbers(word: str) -> tuple[Filter, ...]:
    def f(key: str, cond: str, *phrases: str) -> Filter:
        nouns = tuple(p.format(word) for p in phrases)
        return Filter(key, nouns, tuple(f"{verb} {n}" for n in nouns for verb in ("keep only", "pick")), cond)

    return (
        Filter("all", (f"the {word}",), ()),
        f("even", "{v} % 2 == 0", "the even {}", "the {} divisible by two"),
        f("odd", "{v} % 2 == 1", "the odd {}", "the {} not divisible by two"),
        f("nonzero", "{v} != 0", "the nonzero {}", "the {} other than zero"),
        f("gt3", "{v} > 3", "the {} greater than 3", "the {} above three"),
        f("lt6", "{v} < 6", "the {} less than 6", "the {} below six"),
        f("mul3", "{v} % 3 == 0", "the multiples of 3", "the {} divisible by three"),
    )


_INT_FILTERS = (
    *_numbers("numbers"),
    Filter("positive", ("the positive numbers", "the numbers above zero"), ("keep only the positive ones",), "{v} > 0"),
    Filter("negative", ("the negative numbers", "the numbers below zero"), ("keep only the negative ones",), "{v} < 0"),
    Filter("gt10", ("the numbers greater than 10", "the numbers above ten"), ("drop those up to ten",), "{v} > 10"),
    Filter("end5", ("the numbers that end in 5", "the numbers with last digit five"),
           ("keep those ending in five",), "abs({v}) % 10 == 5"),
    Filter("twodigit", ("the numbers with two or more digits", "the numbers of at least two digits"),
           ("skip the one-digit numbers",), "abs({v}) > 9"),
)  # fmt: skip

_SAME = Map("same", ("{items}",), (), "{v}")
_INT_MAPS = (
    _SAME,
    Map("square", ("the squares of {items}", "{items} squared"), ("square each one", "raise each to the power two"),
        "{v} * {v}"),
    Map("cube", ("the cubes of {items}", "{items} cubed"), ("cube each one", "raise each to the power three"),
        "{v} ** 3"),
    Map("double", ("the doubles of {items}", "twice {items}"), ("double each one", "multiply each by two"), "2 * {v}"),
    Map("triple", ("the triples of {items}", "three times {items}"), ("triple each one", "multiply each by three"),
        "3 * {v}"),
    Map("add1", ("{items} plus one", "the successors of {items}"), ("add one to each", "increment each one"),
        "{v} + 1"),
    Map("complement", ("{items} subtracted from 9", "nine minus {items}"), ("subtract each from nine",), "9 - {v}"),
)  # fmt: skip
_SIGNED_MAPS = (
    Map("negate", ("{items} negated", "the negatives of {items}"), ("negate each one", "flip the sign of each"),
        "-{v}"),
    Map("abs", ("the absolute values of {items}", "the sizes of {items}"), ("take absolute values", "drop the signs"),
        "abs({v})"),
    Map("half", ("the halves of {items} rounded down", "half of {items} rounded down"),
        ("halve each one rounding down",), "{v} // 2"),
    Map("last", ("the last digits of {items}", "the final digits of {items}"), ("take the last digit of each",),
        "abs({v}) % 10"),
)  # fmt: skip

_SUM = Fold("sum", ("the sum of {mapped}", "the total of {mapped}"), ("add them up", "return their total"),
            "return sum({e} for {v} in {it}{if_})", ("total = 0", "total += {e}", "total"), "int")  # fmt: skip
_PRODUCT = Fold("product", ("the product of {mapped}",), ("multiply them together", "return their product"), "",
                ("product = 1", "product *= {e}", "product"), "int")  # fmt: skip
_MAX = Fold("max", ("the largest of {mapped} or 0 if none", "the maximum of {mapped} or 0 if none"),
            ("return the largest or 0 if none is left", "return the maximum with 0 for nothing"),
            "return max([{e} for {v} in {it}{if_}], default=0)", (), "int")  # fmt: skip
_MIN = Fold("min", ("the smallest of {mapped} or 0 if none", "the minimum of {mapped} or 0 if none"),
            ("return the smallest or 0 if none is left", "return the minimum with 0 for nothing"),
            "return min([{e} for {v} in {it}{if_}], default=0)", (), "int")  # fmt: skip
_COUNT = Fold("count", ("the number of {mapped}", "the count of {mapped}"), ("count them", "return how many there are"),
              "return len([{e} for {v} in {it}{if_}])", ("count = 0", "count += 1", "count"))  # fmt: skip
_LIST = Fold("list", ("a list of {mapped}", "all of {mapped} in a list"), ("collect them in a list",
             "return them as a list"),
             "return [{e} for {v} in {it}{if_}]", ("result = []", "result.append({e})", "result"))  # fmt: skip
_SORTED = Fold("sorted", ("{mapped} in ascending order", "{mapped} sorted"), ("sort them", "return them in order"),
               "return sorted({e} for {v} in {it}{if_})", ("result = []", "result.append({e})", "sorted(result)"),
               )  # fmt: skip
_BACKWARD = Fold("backward", ("a list of {mapped} in reverse order", "a list of {mapped} from last to first"),
                 ("return them in reverse order", "list them from last to first"),
                 "return [{e} for {v} in {it}{if_}][::-1]",
                 ("result = []", "result.append({e})", "result[::-1]"))  # fmt: skip
_DISTINCT = Fold("distinct", ("the number of different values among {mapped}", "how many values {mapped} take"),
                 ("count the different values", "return how many distinct values remain"),
                 "return len(set({e} for {v} in {it}{if_}))",
                 ("seen = set()", "seen.add({e})", "len(seen)"))  # fmt: skip
_JOIN = Fold("join", ("{mapped} joined together", "a string of {mapped}"), ("join them into one string",
             "glue them together"), 'return "".join({e} for {v} in {it}{if_})',
             ('result = ""', "result += {e}", "result"), "str")  # fmt: skip
_DASH = Fold("dash", ("{mapped} joined with dashes", "{mapped} with dashes between them"),
             ("join them with dashes", "put dashes between them"), 'return "-".join({e} for {v} in {it}{if_})', (),
             "str")  # fmt: skip
_SPACE = Fold("space", ("{mapped} joined with spaces", "{mapped} with spaces between them"),
              ("join them with spaces", "put spaces between them"), 'return " ".join({e} for {v} in {it}{if_})', (),
              "str")  # fmt: skip

_WORD_FILTERS = (
    Filter("all", ("the words",), ()),
    Filter("long", ("the words longer than 4 letters", "the words of more than four letters"),
           ("keep only words longer than four letters",), "len({v}) > 4"),
    Filter("short", ("the words shorter than 4 letters", "the words of fewer than four letters"),
           ("keep only words shorter than four letters",), "len({v}) < 4"),
    Filter("vowel", ("the words that start with a vowel", "the words with a vowel first"),
           ("keep those that begin with a vowel",), '{v}[0].lower() in "aeiou"'),
    Filter("has_a", ("the words that contain an a", "the words with an a"), ("keep words containing an a",),
           '"a" in {v}'),
    Filter("ends_s", ("the words that end in s", "the words with final s"), ("keep words with an s at the end",),
           '{v}.endswith("s")'),
    Filter("capital", ("the capitalized words", "the words with a capital first"), ("keep the capitalized ones",),
           "{v}[0].isupper()"),
    Filter("palindrome", ("the palindromes", "the words that read the same backwards"), ("keep the palindromes",),
           "{v} == {v}[::-1]"),
)  # fmt: skip
_CASES = (
    Map("upper", ("{items} in upper case", "{items} in capitals"), ("convert each to upper case", "capitalize fully"),
        "{v}.upper()", "str"),
    Map("lower", ("{items} in lower case", "{items} in small letters"), ("convert each to lower case",),
        "{v}.lower()", "str"),
    Map("swap", ("{items} with case swapped", "{items} in opposite case"), ("swap the case of each",),
        "{v}.swapcase()", "str"),
    Map("twice", ("{items} written twice", "{items} repeated"), ("repeat each one", "write each one twice"),
        "{v} + {v}", "str"),
)  # fmt: skip
_TEXT_SAME = Map("same", ("{items}",), (), "{v}", "str")
_WORD_MAPS = (
    _TEXT_SAME,
    *_CASES,
    Map("flip", ("{items} reversed", "{items} spelled backwards"), ("reverse each one", "spell each backwards"),
        "{v}[::-1]", "str"),
    Map("first", ("the first letters of {items}", "the initials of {items}"), ("take each first letter",),
        "{v}[0]", "str"),
    Map("final", ("the last letters of {items}", "the final letters of {items}"), ("take each last letter",),
        "{v}[-1]", "str"),
    Map("length", ("the lengths of {items}", "the letter counts of {items}"), ("take the length of each",),
        "len({v})"),
)  # fmt: skip
_CHAR_FILTERS = (
    Filter("all", ("the characters",), ()),
    Filter("vowel", ("the vowels", "the characters that are vowels"), ("keep only vowels",),
           '{v}.lower() in "aeiou"'),
    Filter("novowel", ("the characters except vowels", "the characters that are no vowels"), ("drop the vowels",),
           '{v}.lower() not in "aeiou"'),
    Filter("letter", ("the letters", "the alphabetic characters"), ("keep only letters",), "{v}.isalpha()"),
    Filter("digit", ("the digits", "the decimal characters"), ("keep only digits",), "{v}.isdigit()"),
    Filter("upper", ("the upper case letters", "the capitals"), ("keep only capitals",), "{v}.isupper()"),
    Filter("lower", ("the lower case letters", "the small letters"), ("keep only small letters",), "{v}.islower()"),
    Filter("nospace", ("the characters except spaces", "the characters that are no spaces"), ("drop the spaces",),
           '{v} != " "'),
)  # fmt: skip
_CHAR_MAPS = (
    _TEXT_SAME,
    *_CASES,
    Map("next", ("the characters after {items}", "the successors of {items}"), ("move each to the next character",),
        "chr(ord({v}) + 1)", "str"),
    Map("code", ("the codes of {items}", "the code points of {items}"), ("take the code of each",), "ord({v})"),
)  # fmt: skip

_ORDER_FOLDS = (
    Fold("up", ("{items} sorted by {key}", "{items} ordered by {key}"), ("sort them by {key}", "order by {key}"),
         "return sorted([{v} for {v} in {it}{if_}], key=lambda {v}: {e})"),
    Fold("down", ("{items} sorted by {key} in descending order", "{items} ordered by falling {key}"),
         ("sort them downwards by {key}", "order by {key} from high to low"),
         "return sorted([{v} for {v} in {it}{if_}], key=lambda {v}: {e}, reverse=True)"),
    Fold("top2", ("the two of {items} with the lowest {key}", "the two with the smallest {key} of {items}"),
         ("return the two with the lowest {key}",),
         "return sorted([{v} for {v} in {it}{if_}], key=lambda {v}: {e})[:2]"),
    Fold("best", ("the one of {items} with the highest {key} or None",
                  "the one with the largest {key} of {items} or None"),
         ("return the one with the highest {key} or None", "choose by highest {key} or give None"),
         "return max([{v} for {v} in {it}{if_}], key=lambda {v}: {e}, default=None)"),
    Fold("tally", ("a dict that counts {items} by {key}", "counts of {items} for each {key}"),
         ("count them by {key} in a dict", "tally them by {key}"), "",
         ("counts = {{}}", "counts[{e}] = counts.get({e}, 0) + 1", "counts")),
    Fold("group", ("a dict of lists that groups {items} by {key}", "groups of {items} for each {key}"),
         ("group them by {key} in a dict", "make lists of them by {key}"), "",
         ("groups = {{}}", "groups.setdefault({e}, []).append({v})", "groups")),
    Fold("index", ("a dict from {key} to the last of {items}", "the last of {items} for each {key}"),
         ("map {key} to the last of them",), "return {{{e}: {v} for {v} in {it}{if_}}}"),
)  # fmt: skip
_INT_KEYS = (
    Map("size", ("absolute value", "size without sign"), (), "abs({v})"),
    Map("last", ("last digit", "final digit"), (), "abs({v}) % 10"),
    Map("mod3", ("remainder by 3", "remainder after division by three"), (), "{v} % 3"),
    Map("mod4", ("remainder by 4", "remainder after division by four"), (), "{v} % 4"),
    Map("tens", ("quotient by 10", "whole number of tens"), (), "{v} // 10"),
    Map("ten", ("distance to 10", "difference from ten"), (), "abs({v} - 10)"),
    Map("value", ("value",), (), "{v}"),
)
_WORD_KEYS = (
    Map("length", ("length", "number of letters"), (), "len({v})"),
    Map("first", ("first letter", "initial"), (), "{v}[0]"),
    Map("final", ("last letter", "final letter"), (), "{v}[-1]"),
    Map("lower", ("lower case form", "form in small letters"), (), "{v}.lower()"),
    Map("flip", ("reversed form", "backward spelling"), (), "{v}[::-1]"),
    Map("count_a", ("count of a", "number of a letters"), (), '{v}.count("a")'),
)

FAMILIES: tuple[Family, ...] = (
    Family("numbers", ("nums", "values", "items"), ("n", "x", "v"), ("a list of integers", "a list of whole numbers"),
           "in the list", "{arg}", "ints", _INT_FILTERS, (*_INT_MAPS, *_SIGNED_MAPS),
           (_SUM, _PRODUCT, _MAX, _MIN, _COUNT, _LIST, _SORTED, _BACKWARD, _DISTINCT)),
    Family("digits", ("number", "n", "value"), ("d", "x"), ("an integer", "a whole number"),
           "in the decimal form", "map(int, str(abs({arg})))", "int", _numbers("digits"), _INT_MAPS,
           (_SUM, _PRODUCT, _MAX, _MIN, _COUNT, _LIST, _SORTED, _BACKWARD, _DISTINCT)),
    Family("words", ("text", "line", "sentence"), ("w", "word"), ("a text", "a string of words"),
           "in the text", "{arg}.split()", "text", _WORD_FILTERS, _WORD_MAPS,
           (_JOIN, _DASH, _SPACE, _SUM, _MAX, _MIN, _COUNT, _LIST, _SORTED, _BACKWARD, _DISTINCT)),
    Family("chars", ("text", "line", "s"), ("c", "ch"), ("a string", "a piece of text"),
           "in the string", "{arg}", "text", _CHAR_FILTERS, _CHAR_MAPS,
           (_JOIN, _DASH, _SUM, _MAX, _COUNT, _LIST, _SORTED, _BACKWARD, _DISTINCT)),
    Family("number_keys", ("nums", "values", "items"), ("n", "x", "v"),
           ("a list of integers", "a list of whole numbers"), "in the list", "{arg}", "ints", _INT_FILTERS, _INT_KEYS,
           _ORDER_FOLDS),
    Family("word_keys", ("words", "names", "items"), ("w", "x", "word"), ("a list of words", "a list of strings"),
           "in the list", "{arg}", "words", _WORD_FILTERS, _WORD_KEYS, _ORDER_FOLDS),
)  # fmt: skip
