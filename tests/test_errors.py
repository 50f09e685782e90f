import pytest

from mixer.errors import UserError, check_choice


def test_wrong_choice_names_the_value_the_choices_and_the_nearest():
    check_choice("gelu", "erf", {"tanh": 1, "erf": 2})
    with pytest.raises(UserError) as caught:
        check_choice("gelu", "Tahn", ("tanh", "erf"), hint="exact or not")
    assert str(caught.value) == (
        "gelu='Tahn'; expected one of tanh, erf (exact or not). Did you mean 'tanh'?"
    )
    for value in (["tanh"], None, 3):
        with pytest.raises(UserError, match=r"gelu=.*tanh, erf"):
            check_choice("gelu", value, ("tanh", "erf"))
