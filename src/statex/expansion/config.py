"""What to expand: the one typed description of an expansion, free of torch and of any model."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from statex.errors import UserError

Initialization = Literal["reinit", "inherit", "preserve"]

Method = Literal["grow", "merge"]

ToList = BeforeValidator(lambda value: list(value) if isinstance(value, tuple | range) else value)


class ExpansionConfig(BaseModel):
    """Which layers to expand, by how much, and how the new parameters start (arXiv 2509.22630, section 3).

    Exactly one of `layers`, `every` and `num_layers` chooses among the model's recurrent layers; without any of
    them the paper's choice for its two model families, every 6th, is taken.

    Args:
        layers: indices of the layers to expand, in the model's own numbering; a list, a tuple or a range.
        every: expand every k-th recurrent layer, beginning with the first.
        num_layers: expand n of the L recurrent layers, at floor(i L / n).
        factor: by how much each layer's state grows; the default is the paper's (GLA: all heads into one,
            Mamba2: 4).
        method: "grow" adds keys to each head, "merge" makes one head of several; the default is the family's own with
            this `init`, and most have one alone (docs/families.md).
        init: "reinit" makes the whole token mixer fresh, with its pre-norm (the paper's default); "inherit" keeps
            the old weights; "preserve" makes the expanded model compute the same function at step 0.
        rank: only with GLA's "preserve": the new query and key rows are a product of this rank instead of full rows.
        seed: seed of the fresh parameters.

    Raises:
        UserError: a value is out of its range or two selections were made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layers: Annotated[list[int], ToList] | None = None
    every: int | None = Field(default=None, ge=1, lt=2**31)
    num_layers: int | None = Field(default=None, ge=1, lt=2**31)
    factor: int | None = Field(default=None, ge=2, lt=2**31)
    method: Method | None = None
    init: Initialization = "reinit"
    rank: int | None = Field(default=None, ge=1, lt=2**31)
    seed: int = Field(default=0, ge=0, lt=2**32)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise user_error(error) from None

    @model_validator(mode="after")
    def _one_selection(self):
        chosen = [name for name in ("layers", "every", "num_layers") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude one another; give one of them")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError("layers must name at least one layer, and none twice; list each layer once")
        if self.rank is not None and self.init != "preserve":
            raise ValueError('rank goes only with init = "preserve"; drop rank or change init')
        return self


PRESETS: dict[str, ExpansionConfig] = {
    "paper-gla": ExpansionConfig(every=6),  # factor None is all heads: H becomes 1
    "paper-mamba2": ExpansionConfig(every=6, factor=4),
    "paper-mamba2-code": ExpansionConfig(every=1, factor=4),  # what the released script does
}


def user_error(error: ValidationError) -> UserError:
    """The first complaint of pydantic, or of our own validators, as a UserError with the dotted name of the field."""
    first = error.errors()[0]
    section = [str(part) for part in first["loc"]]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, UserError):
        return UserError(".".join([*section, own.field]), own.value, own.problem, own.remedy)
    problem, _, remedy = first["msg"].removeprefix("Value error, ").partition("; ")
    if first["type"] == "extra_forbidden":
        problem, remedy = "is not a known key", "remove it or correct its spelling"
    elif first["type"] == "missing":
        return UserError(".".join(section), None, "is missing", "add it")
    return UserError(".".join(section) or "configuration", first["input"], problem, remedy or "correct the value")
