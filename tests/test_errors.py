"""The checks of choices and numbers in a config."""

import math

import pytest

from mixer.errors import UserError, check_choice, check_number


def test_invalid_choice_names_the_value_choices_and_closest_match():
    check_choice("gelu", "erf", {"tanh": 1, "erf": 2})
    with pytest.raises(UserError) as error:
        check_choice("gelu", "Tahn", ("tanh", "erf"), hint="exact or not")
    assert str(error.value) == (
        "gelu='Tahn'; expected one of tanh, erf (exact or not). Did you mean 'tanh'?"
    )
    for value in (["tanh"], None, 3):
        with pytest.raises(UserError, match=r"gelu=.*tanh, erf"):
            check_choice("gelu", value, ("tanh", "erf"))


@pytest.mark.parametrize(
    ("value", "limits", "expected"),
    [
        (-0.1, {}, "finite number of at least 0"),
        (math.inf, {}, "finite number of at least 0"),
        (math.nan, dict(limit=1), "finite number of at least 0 and below 1"),
        (1, dict(limit=1), "finite number of at least 0 and below 1"),
        (1.0, dict(minimum=1, limit=9, integer=True), "whole number of at least 1 and below 9"),
        (0, dict(minimum=1, integer=True), "whole number of at least 1"),
    ],
)
def test_invalid_number_names_the_value_and_the_range(value, limits, expected):
    with pytest.raises(UserError) as error:
        check_number("key", value, **limits)
    assert str(error.value) == f"key={value}; expected a {expected}"


def test_numbers_within_the_range_pass():
    check_number("key", 0)
    check_number("key", 0.99, limit=1)
    check_number("key", 8, minimum=1, limit=9, integer=True)
