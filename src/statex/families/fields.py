"""What the values of a configuration may be, whatever file or recipe they come from."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(ge=1, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]
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
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Annotated[list[int], Field(min_length=1)] | None = None
    dtype: DTypeName | None = None
    torch_dtype: DTypeName | None = None
    num_labels: Annotated[int, Field(ge=0, le=MOST_LABELS)] | None = None
    id2label: dict[str, str] | None = None
    label2id: dict[str, int | str] | None = None
    auto_map: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _token_ids_exist(self):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) else [value]
            if not all(one is None or 0 <= one < self.vocab_size for one in ids):
                raise ValueError(f"{name} = {value!r} is not below vocab_size = {self.vocab_size}; use a token's id")
        return self
