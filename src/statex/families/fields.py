"""What the values of a configuration may be, whatever file or recipe they come from."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from statex.errors import UserError

Size = Annotated[int, Field(ge=1, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]
NegativeFloat = Annotated[float, Field(lt=0)]
Share = Annotated[float, Field(gt=0, le=1024)]
DTypeName = Literal["float16", "bfloat16", "float32", "float64"]
MOST_LABELS = 100_000  # transformers makes two dictionaries of them, though a language model has none


class ConfigFields(BaseModel):
    """The fields that all families share; a family adds its own. Fields that are not named may be anything.

    They are stricter than transformers' configurations, which check types but not that a size can be one.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    tensor_sizes: ClassVar[tuple[str, ...]] = ("vocab_size", "hidden_size")
    """The sizes that no model can have without a tensor that is as long in some dimension."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    max_position_embeddings: Size = 1
    initializer_range: Annotated[float, Field(ge=0)]
    pad_token_id: Any = None
    bos_token_id: Any = None
    eos_token_id: Any = None
    dtype: DTypeName | None = None
    torch_dtype: DTypeName | None = None
    num_labels: Annotated[int, Field(ge=0, le=MOST_LABELS)] | None = None
    id2label: dict[str, str] | None = None
    label2id: dict[str, int | str] | None = None
    auto_map: dict[str, Any] | None = None
    expansion: list[dict[str, Any]] | dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_their_present_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        return cls.by_present_names(values)

    @classmethod
    def by_present_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a config.json, those that transformers also takes from elsewhere under their present names."""
        return values

    @model_validator(mode="after")
    def _token_ids_exist(self):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if value is not None and not (ids and all(type(one) is int and 0 <= one < self.vocab_size for one in ids)):
                problem = f"is not a token of a vocabulary of {self.vocab_size} (vocab_size)"
                raise UserError(name, value, problem, "use a token's id, or null")
        return self
