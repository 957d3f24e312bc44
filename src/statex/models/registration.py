"""Make our names known to transformers' Auto classes without importing our code before one of them is used.

The families and their configurations are imported when one of transformers' mappings is first read, and a model class
when it is looked up: importing model code takes seconds.
"""

from collections.abc import Callable, Container, ItemsView, Iterator, KeysView, ValuesView
from functools import partial
from typing import Any


class LateEntries(dict):
    """The extra entries of one of transformers' auto mappings, ours among them; a model class is made when asked for.

    transformers keeps what is registered in an attribute of each mapping, `_extra_content`, and this takes its place.
    From 5.17 to 5.24 its public `register` takes classes, not names: called by `import statex`, it would have every
    family and configuration imported then, which nearly doubles the time, and model code on top.

    It also keeps transformers' own model types as they are when flash-linear-attention is imported, which registers
    other classes under some of their names. It is not statex alone that imports it, but transformers too, with some of
    its models. Models of FLA's classes are still made from their configurations.
    """

    def __init__(self, entries: dict, own: Container = ()):
        super().__init__()
        self.own = own
        """The model types of transformers itself."""
        self.unlisted: dict[str, Late] = {}
        """Found by name, but not by going through all entries, which would import another library."""
        for key, value in entries.items():
            self[key] = value

    def __contains__(self, key: object) -> bool:
        _register_once()
        return super().__contains__(key) or key in self.unlisted

    def __getitem__(self, key: Any) -> Any:
        _register_once()
        value = (
            self.unlisted[key] if key in self.unlisted and not super().__contains__(key) else super().__getitem__(key)
        )
        if isinstance(value, Late):
            value = self[key] = value.make()
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        if key in self.own and value.__module__.partition(".")[0] == "fla":
            return
        super().__setitem__(key, value)

    def __iter__(self) -> Iterator:
        _register_once()
        return iter(list(super().__iter__()))  # making a class may import a library that registers its own

    def __len__(self) -> int:
        _register_once()
        return super().__len__()

    def keys(self) -> KeysView:  # type: ignore[override]
        return KeysView(self)

    def values(self) -> ValuesView:  # type: ignore[override]
        return ValuesView(self)

    def items(self) -> ItemsView:  # type: ignore[override]
        return ItemsView(self)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (this is what `get` is)


class Late:
    """A class that has not been made yet."""

    def __init__(self, make: Callable[[], type]):
        self.make = make


_IS_DONE: list[bool] = []


def _register_once() -> None:
    if not _IS_DONE:
        register_families()


def register_when_needed() -> None:
    """Have our names registered as soon as one of transformers' mappings is read; its own names stay untouched, even
    by flash-linear-attention, whether that was imported before or is later."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if not isinstance(mapping._extra_content, LateEntries):
            own = mapping._mapping if mapping is CONFIG_MAPPING else ()  # the others have classes as keys
            mapping._extra_content = LateEntries(mapping._extra_content, own)


def register_families() -> None:
    """Add the configuration and the model classes of every family in `FAMILIES` to transformers' Auto classes.

    Those of flash-linear-attention are found by their names alone, and added when they are made (`models/factory.py`):
    before that, FLA would have to be imported.
    """
    _IS_DONE.append(True)
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig

    from statex.families import FAMILIES
    from statex.models.factory import expanded_config_class

    register_when_needed()
    tables: Any = CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    for family in FAMILIES.values():
        if family.library == "fla":
            for name in (family.model_type, family.expanded_type):
                tables[0]._extra_content.unlisted[name] = Late(partial(_of_fla, family, name))
            continue
        config_class = expanded_config_class(family)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for mapping, name in zip(tables[1:], ("model", "causal_lm"), strict=True):
            late: Any = Late(partial(_model_class, family, name))
            mapping.register(config_class, late, exist_ok=True)


def _model_class(family: Any, name: str) -> type:
    from statex.models.factory import expanded_model_classes

    return getattr(expanded_model_classes(family), name)


def _of_fla(family: Any, model_type: str) -> type:
    """The configuration of that type of flash-linear-attention's or ours, which are entries from now on."""
    from transformers import CONFIG_MAPPING

    from statex.models.factory import expanded_model_classes

    expanded_model_classes(family)
    return CONFIG_MAPPING[model_type]
